"""Spectra of attention maps: closed forms, and the three kinds of networks they are taken from."""

from types import SimpleNamespace

import pytest
import torch
from small_gan import save_gan

from hrrformer.config import AttentionConfig, ModelConfig, TrainConfig
from hrrformer.model import SequenceClassifier
from runtime.cli import run_command
from tools import singular_values
from tools.singular_values import rank_of_energy, spectra, summary


def test_ranks_of_known_spectra():
    uniform = torch.full((1, 1, 8, 4), 0.25)  # every query weighs all keys alike: rank one
    assert rank_of_energy(spectra(uniform), 0.99).tolist() == [1]
    identity = torch.eye(10)[None, None]  # each token sees itself: every direction holds a tenth
    values = spectra(identity)
    assert rank_of_energy(values, 0.9).tolist() == [9] and rank_of_energy(values, 0.99).tolist() == [10]
    diagonal = torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None, None]
    torch.testing.assert_close(spectra(diagonal), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64))
    assert rank_of_energy(spectra(diagonal), 0.9).tolist() == [2]  # 9 + 4 of 14
    assert summary(torch.cat([values, spectra(torch.diag(torch.arange(10.0) == 0).float()[None, None])])) == (
        "of 10: 90% at 1 (1 to 9), 99% at 1 (1 to 10)"
    )


def test_a_biggan(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["--checkpoint", str(save_gan(tmp_path / "gan.pt")), "--num", "3", "--out", str(tmp_path / "s.png")]
    assert run_command(singular_values.main, command) == 0
    assert "generator, 16x16, dense, 3 map(s) of 64: 90% at" in capsys.readouterr().out
    assert (tmp_path / "s.png").stat().st_size > 10_000


@pytest.mark.parametrize("attention", ["hrr", "dense"])
def test_a_sequence_classifier(tmp_path, monkeypatch, capsys, attention):
    pytest.importorskip("matplotlib")
    sizes = {"dim": 16, "num_heads": 2, "num_layers": 2, "mlp_dim": 16}
    model = ModelConfig(vocab_size=9, max_length=12, num_outputs=3, **sizes)
    config = TrainConfig(model=model, attention=AttentionConfig(attention))
    classifier = SequenceClassifier(model, attention).eval()
    tokens = torch.randint(1, 9, (5, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(singular_values, "load_classifier", lambda path: (classifier, config, {}, path))
    monkeypatch.setattr(singular_values, "open_data", lambda config: SimpleNamespace(test=Split(tokens)))
    monkeypatch.setattr(singular_values, "fit_to_data", lambda config, data: config)
    command = ["--hrrformer", "run", "--num", "3", "--out", str(tmp_path / "s.png")]
    assert run_command(singular_values.main, command) == 0
    assert f"layer 2, {attention}, 6 map(s) of 12: 90% at" in capsys.readouterr().out


class Split:
    """Examples, as a task's split gives them."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def rows(self, chosen, length):
        return self.tokens[chosen, :length]


def test_a_transformers_model(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the"]))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=7, max_position_embeddings=24, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    command = ["--transformers", str(tmp_path), "--out", str(tmp_path / "s.png")]
    assert run_command(singular_values.main, command) == 0
    assert "layer 2, 2 map(s) of 24: 90% at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments"),
        (["--transformers", "nowhere", "--attention", "dense"], "--attention is for --checkpoint"),
        (["--hrrformer", "nowhere"], "nowhere"),
        (["--checkpoint", "nowhere", "--num", "0"], "at least 1"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run_command(singular_values.main, [*arguments, "--out", "s.png"]) == 2
    assert message in capsys.readouterr().err
