"""The classifier: its variations against plain formulas, padding, shapes, compilation, and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from mechanisms import OPTIONS
from small_models import build, sequences, small
from tolerance import assert_close, assert_no_worse

from attention import HRRSelfAttention, available_attention, get_mechanism
from hrrformer.config import ModelConfig
from hrrformer.layers import EncoderLayer, sinusoids
from hrrformer.model import SequenceClassifier
from hrrformer.presets import PRESETS

TASKS = list(PRESETS)
PADDED = [task for task in TASKS if PRESETS[task]["single"]().model.use_mask]


@pytest.mark.parametrize("attention", ["hrr", "dense"])
@pytest.mark.parametrize("task", PADDED)
def test_padding_changes_nothing(task, attention):
    config = small(task)
    model = build(config, attention).eval()
    tokens = sequences(config, length=13)
    padded = F.pad(tokens, (0, 7))
    out = model(tokens)
    assert_close(model(padded), out)
    other = model(torch.where(padded == 0, 5, padded))  # tokens there would
    assert (other - out).abs().max() > 1e-3 * out.abs().max()


def test_padding_counts_in_the_treatment_of_the_original():
    config = small("text", pooling="mean")
    model = build(config, mask_superposition=False).eval()
    tokens = sequences(config, length=13)
    assert (model(F.pad(tokens, (0, 7))) - model(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("task", PADDED)
def test_nothing_but_padding_is_finite(task):
    config = small(task)
    model = build(config)
    tokens = sequences(config)
    tokens[0] = 0
    out = model(tokens)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_pooling_stays_in_float32():
    model = build(small("text"))
    x = torch.randn(2, 20, 16) + 10
    mask = torch.arange(20).expand(2, -1) >= 17
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model.pool(x, mask), x[:, :17].mean(1))


@pytest.mark.parametrize("norm", ["post", "pre", "mlp"])
def test_layer_norms_stand_where_they_should(norm):
    config = small("image", norm=norm)
    torch.manual_seed(0)
    layer = EncoderLayer(config, "hrr", {}).eval()
    x = torch.randn(2, 9, 16)

    def normalized(x, module):
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(deviation**2 + 1e-6) * module.weight + module.bias

    def mlp(x):
        hidden = x @ layer.mlp.hidden.weight.T + layer.mlp.hidden.bias
        return F.gelu(hidden, approximate="tanh") @ layer.mlp.output.weight.T

    if norm == "post":
        y = normalized(x + layer.attention(x), layer.attention_norm)
        y = normalized(y + mlp(y), layer.mlp_norm)
    else:
        y = x + layer.attention(normalized(x, layer.attention_norm) if norm == "pre" else x)
        y = y + mlp(normalized(y, layer.mlp_norm))
    assert_close(layer(x), y)
    assert hasattr(layer.attention_norm, "weight") == (norm != "mlp")


def test_two_documents_are_compared():
    config = small("retrieval")
    model = build(config).eval()
    tokens = sequences(config)
    tokens[:, 1, 15:] = 0
    first, second = (model.pool(*model.encode(tokens[:, i])) for i in range(2))
    assert_close(model(tokens), model.readout(torch.cat([first, second, first * second, first - second], dim=-1)))


def test_class_token_stands_in_front_without_a_position():
    config = small("malware")
    model = build(config).eval()
    tokens = sequences(config, length=12)
    tokens[:, 9:] = 0
    x, mask = model.embed(tokens)
    assert x.shape == (3, 13, 16)
    assert torch.equal(mask, F.pad(tokens == 0, (1, 0)))
    assert torch.equal(x[:, 0], model.cls_token[0].expand(3, -1))
    assert torch.equal(x[:, 1:], model.token_embedding(tokens) + model.position_embedding.weight[:12])
    encoded, _ = model.encode(tokens)
    assert torch.equal(model(tokens), model.readout(encoded[:, 0]))


def test_sinusoids():
    table = sinusoids(50, 8).double()
    for position, pair in ((0, 0), (7, 1), (49, 3)):
        angle = torch.tensor(position / 10000 ** (2 * pair / 8), dtype=torch.float64)
        assert_close(table[position, 2 * pair : 2 * pair + 2], torch.stack([angle.sin(), angle.cos()]), 1e-6)
    assert sinusoids(5, 7).shape == (5, 7)


def test_initial_weights():
    torch.manual_seed(0)
    model = SequenceClassifier(replace(PRESETS["listops"]["single"]().model, num_layers=1))
    for embedding in (model.token_embedding, model.position_embedding):
        assert abs(embedding.weight.std().item() * 512**0.5 - 1) < 0.05
    layer = model.layers[0]
    linears = [layer.attention.query, layer.attention.output, layer.mlp.hidden, layer.mlp.output, model.readout.hidden]
    for linear in linears:
        scaled = linear.weight * linear.in_features**0.5
        assert abs(scaled.std().item() - 1) < 0.02
        assert 2.1 < scaled.abs().max().item() <= 2 / 0.8796
    assert not model.readout.output.bias.any() and not layer.mlp.hidden.bias.any()


@pytest.mark.parametrize("task", TASKS)
def test_mechanisms_have_the_same_parameters(task):
    config = small(task)
    shapes = {
        name: {key: value.shape for key, value in build(config, name, **options).state_dict().items()}
        for name, options in {
            "hrr": {},
            "dense": {},
            "smyrf": dict(num_hashes=1, q_cluster_size=4, k_cluster_size=4),
        }.items()
    }
    assert shapes["hrr"] == shapes["dense"] == shapes["smyrf"]


@pytest.mark.parametrize("name", available_attention())
def test_every_mechanism_is_a_choice(name):
    """The length, width and number of heads come from the model; a mask goes where the mechanism takes one."""
    masked = get_mechanism(name).masks is True
    config = small("text", num_layers=1, use_mask=masked, dropout=0.0)
    model = build(config, name, **OPTIONS[name])
    tokens = sequences(config)
    if masked:
        tokens[:, 15:] = 0
    model(tokens).square().sum().backward()
    layer = model.layers[0].attention
    grads = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in grads) or not grads


def test_attention_weights():
    """One weight a token and head: w v, projected, is what the layer's attention returns."""
    config = small("text", num_layers=1)
    model = build(config).eval()
    tokens = sequences(config)
    tokens[:, 15:] = 0
    (weights,) = model.attention_weights(tokens)
    assert weights.shape == (3, 2, 20)
    assert_close(weights.sum(-1), torch.ones(3, 2))
    assert not weights[..., 15:].any()
    layer = model.layers[0]
    x, mask = model.embed(tokens)
    inputs = layer.attention_input(x)
    values = layer.attention.value(inputs).unflatten(-1, (2, 8))  # (B, N, H, D)
    out = (weights.transpose(1, 2)[..., None] * values).flatten(2)
    assert_close(layer.attention.output(out), layer.attention(inputs, mask))
    assert len(build(small("text", num_layers=3)).eval().attention_weights(tokens)) == 3
    with pytest.raises(ValueError, match="only hrr"):
        build(config, "dense").attention_weights(tokens)


@pytest.mark.parametrize(
    ("task", "attention"),
    [("text", "hrr"), ("malware", "dense")]
    + [pytest.param(task, name, marks=pytest.mark.slow) for task in TASKS for name in ("hrr", "dense")],
)
def test_compiles_as_one_graph(task, attention):
    torch._dynamo.reset()  # all tasks' models share one class, and its programs are counted
    config = small(task, num_layers=1, dropout=0.0)
    model = build(config, attention)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    tokens = sequences(config)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(tokens)
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for plain, ours in zip(*results, strict=True):
        assert_close(ours, plain)


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_keeps_norms_and_softmax_in_float32(task):
    """Autocast is no worse than the whole network in bfloat16; the residual stream stays float32."""
    config = small(task, dropout=0.0)
    model, tokens = build(config).eval(), sequences(config)
    truth = build(config).double().eval()(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
        encoded = model.encode(tokens[:, 0] if config.dual_input else tokens)[0]
    assert encoded.dtype is torch.float32
    assert_no_worse(out.bfloat16(), build(config).bfloat16().eval()(tokens), truth)


def test_dropout_is_for_training_only():
    config = small("image", dropout=0.5)
    model = build(config)
    tokens = sequences(config)
    assert not torch.equal(model(tokens), model(tokens))
    torch.manual_seed(3)
    first = model(tokens)
    torch.manual_seed(3)
    assert torch.equal(model(tokens), first)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_hrr_layer_is_the_librarys():
    """Hrrformer's encoder layer uses the parameters of `attention.HRRSelfAttention`, by name."""
    config = small("malware")
    ours = EncoderLayer(config, "hrr", {}).attention
    library = HRRSelfAttention(16, 2, bias=True)
    library.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 16)
    assert torch.equal(library(x), ours(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"norm": "middle"}, "post, pre, mlp"),
        ({"pooling": "max"}, "masked-mean"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_heads": 3}, "multiple"),
    ],
)
def test_refuses_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        build(small("image", **change))


def test_refuses_mechanisms_and_options():
    config = ModelConfig(vocab_size=10, max_length=8, num_outputs=2, dim=16, num_heads=2, mlp_dim=8)
    with pytest.raises(ValueError, match="dense"):
        build(config, "densest")
    with pytest.raises(TypeError, match="mask_superposition"):
        build(config, "hrr", mask_superpositions=False)


def test_refuses_sequences():
    model = build(small("image"))
    with pytest.raises(ValueError, match="21 tokens.*20"):
        model(torch.zeros(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        model(torch.zeros(1, 2, 20, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(B, 2, T\)"):
        build(small("retrieval"))(torch.zeros(1, 20, dtype=torch.long))
