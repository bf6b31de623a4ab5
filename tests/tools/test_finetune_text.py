"""Fine-tuning and the exchange on a tiny random BERT and files of a few lines."""

import json
import os
import shutil

import numpy as np
import pytest

os.environ.setdefault("USE_TORCH_XLA", "0")  # else importing transformers sets PJRT_DEVICE for all later tests
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch  # noqa: E402

from runtime.errors import UserError  # noqa: E402
from tools import exchange_text, finetune_text  # noqa: E402
from tools.text_metrics import METRICS, score  # noqa: E402
from tools.text_models import Attention, freeze, load_model  # noqa: E402
from tools.text_tasks import TASKS, read_task  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "was", "good", "bad", "it", "is"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a BERT of two layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes, **dropout)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rte(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    (folder / "RTE").mkdir()
    kinds = [("good", "entailment"), ("bad", "not_entailment")]
    for split, count in (("train", 24), ("dev", 8)):
        lines = [
            f'{i}\ta "film was {word} {word} {word}\tit is {word}\t{label}'
            for i in range(count)
            for word, label in kinds
        ]
        (folder / "RTE" / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def imdb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imdb") / "aclImdb"
    for split in ("train", "test"):
        for label, word in (("neg", "bad"), ("pos", "good")):
            (folder / split / label).mkdir(parents=True)
            for i in range(6):
                (folder / split / label / f"{i}_1.txt").write_text(f"a film was {word}.<br />it is " * (i + 1))
    return folder


def finetune(model, data, out, *more):
    argv = ["--task", "rte", "--data", str(data), "--model", model, "--out", str(out), "--batch-size", "8"]
    return finetune_text.main([*argv, "--learning-rate", "0.01", *more])


def test_trains_saves_and_exchanges(model, rte, tmp_path, capsys):
    options = ["--attention", "smyrf:2x4", "--epochs", "6"]
    assert finetune(model, rte, tmp_path, *options) == 0
    results = json.loads((tmp_path / "results.json").read_text())["validation"]
    assert results["smyrf:2x4:union"]["accuracy"] > 90  # a word tells

    weights = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    finetune(model, rte, tmp_path, *options, "--eval-attention", "dense", "smyrf:1x4")  # evaluates, trains no more
    results = json.loads((tmp_path / "results.json").read_text())["validation"]
    assert set(results) == {"smyrf:2x4:union", "dense", "smyrf:1x4:union"}
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert "trained smyrf:2x4:union, evaluated dense: accuracy" in capsys.readouterr().out
    with pytest.raises(UserError, match="epochs was 6.0, now 2.0"):
        finetune(model, rte, tmp_path, "--attention", "smyrf:2x4", "--epochs", "2")


def test_a_stopped_run_resumes_to_the_same_weights(model, rte, tmp_path, monkeypatch, capsys):
    finetune(model, rte, tmp_path / "whole", "--epochs", "1")

    def stop_early(self, args, state, control, **unused):
        if state.global_step == 3:
            self.stop.requested = True
            control.should_save = control.should_training_stop = True
        return control

    with monkeypatch.context() as patched:
        patched.setattr("tools.text_models._StopOnRequest.on_step_end", stop_early)
        assert finetune(model, rte, tmp_path / "parts", "--epochs", "1") == 0
    assert "the same command resumes" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "model").exists()
    finetune(model, rte, tmp_path / "parts", "--epochs", "1")
    whole, parts = (load_model(str(tmp_path / name / "model"), 2).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_exchange_writes_table_and_curve_and_resumes(model, imdb, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    argv = ["--model", model, "--data", str(imdb), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "e.json")]
    argv += ["--plot", str(tmp_path / "e.png"), "--seeds", "2", "--train-reviews", "8", "--test-reviews", "6"]
    argv += ["--max-length", "32", "--batch-size", "4", "--attention", "smyrf:2x8", "--curve", "1x8", "2x8"]
    assert exchange_text.main(argv) == 0
    record = json.loads((tmp_path / "e.json").read_text())
    assert [(row["trained"], row["evaluated"], len(row["accuracy"])) for row in record["exchange"]] == [
        (trained, used, 2) for trained in ("dense", "smyrf:2x8:union") for used in ("dense", "smyrf:2x8:union")
    ]
    assert all(row["difference"] == 0 for row in record["exchange"] if row["trained"] == row["evaluated"])
    assert {(row["evaluated"], row["memory"]) for row in record["curve"]} == {
        ("smyrf:1x8:union", 0.25),
        ("smyrf:2x8:union", 0.5),
        ("smyrf:2x8:multiset", 0.5),
    }
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    assert "| trained \\ evaluated | dense | smyrf:2x8:union |" in capsys.readouterr().out
    monkeypatch.setattr("tools.text_models.train", None)  # nothing is trained or predicted a second time
    monkeypatch.setattr("tools.text_models.predict", None)
    assert exchange_text.main(argv) == 0
    assert json.loads((tmp_path / "e.json").read_text())["curve"] == record["curve"]


def test_attention_is_parsed_and_counted():
    assert str(Attention.parse("smyrf")) == "smyrf:4x32:union"
    assert Attention.parse("smyrf:8x16:multiset") == Attention("smyrf", 8, 16, "multiset")
    assert Attention.parse("smyrf:4x32").memory(256) == 0.5
    assert Attention.parse("dense").memory(256) == Attention.parse("smyrf:4x300").memory(256) == 1
    for text in ("smurf", "smyrf:4", "smyrf:0x32", "smyrf:4x32:mean"):
        with pytest.raises(UserError, match="unknown attention"):
            Attention.parse(text)


def test_freezing(model):
    frozen = load_model(model, 2)
    freeze(frozen, 1)
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trained and all("layer.1." in name or "pooler" in name or "classifier" in name for name in trained)
    with pytest.raises(UserError, match="has 2 layers"):
        freeze(frozen, 3)


def test_metrics():
    predicted, labels = np.array([1, 1, 0, 1, 0, 0]), np.array([1, 0, 0, 1, 1, 0])  # 2 hits, 1 false, 1 missed, 2 right
    assert METRICS["accuracy"](predicted, labels) == pytest.approx(4 / 6)
    assert METRICS["f1"](predicted, labels) == pytest.approx(2 / 3)
    assert METRICS["matthews"](predicted, labels) == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert METRICS["matthews"](np.ones(6), labels) == 0
    values = np.array([0.5, 2.0, 1.0])
    assert METRICS["pearson"](3 * values - 1, values) == pytest.approx(1)
    assert METRICS["spearman"](np.exp(values), values) == pytest.approx(1)
    assert score(("accuracy",), np.array([[0.1, 0.2], [3.0, 1.0]]), np.array([1, 1])) == {"accuracy": 50}
    assert score(("pearson",), values[:, None], -values)["pearson"] == pytest.approx(-100)


HEADERS = {  # a line of each official file, with the columns in their places
    "cola": ("CoLA", None, "gj04\t1\t\tIt is.", ["It is."], None, [1]),
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '0\t1\t2\tA "b\tc', ['A "b'], ["c"], [0]),
    "sts-b": ("STS-B", "index\tsentence1\tsentence2\tscore", "0\ta\tb\t3.800", ["a"], ["b"], [3.8]),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta?\tb?\t1", ["a?"], ["b?"], [1]),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "0\tq\ts\tnot_entailment", ["q"], ["s"], [1]),
    "sst-2": ("SST-2", "sentence\tlabel", "fine \t1", ["fine "], None, [1]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_official_files(name, tmp_path):
    folder, header, line, texts, pairs, labels = HEADERS[name]
    (tmp_path / folder).mkdir()
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / folder / file).write_text("\n".join(filter(None, [header, line])) + "\n")
    task, examples = read_task(name, str(tmp_path))
    assert set(examples) == {"train", "validation"} and task.num_outputs == (1 if name == "sts-b" else 2)
    assert (examples["train"].texts, examples["train"].pairs, examples["train"].labels) == (texts, pairs, labels)


def test_mnli_has_two_validation_sets(tmp_path):
    for file, label in (("train", "neutral"), ("dev_matched", "contradiction"), ("dev_mismatched", "entailment")):
        (tmp_path / f"{file}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tx\t{label}\n")
    task, examples = read_task("mnli", str(tmp_path))
    assert task.num_outputs == 3
    assert {split: found.labels for split, found in examples.items()} == {
        "train": [1],
        "validation_matched": [2],
        "validation_mismatched": [0],
    }


def test_clear_errors(model, rte, tmp_path):
    with pytest.raises(UserError, match="unknown task 'glue'; tasks are cola"):
        read_task("glue", str(rte))
    with pytest.raises(UserError, match="does not exist; --data takes the folder RTE"):
        read_task("rte", str(tmp_path / "none"))
    with pytest.raises(UserError, match="train.tsv is missing"):
        read_task("rte", str(tmp_path))
    (tmp_path / "train.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    with pytest.raises(UserError, match="no column 'label'"):
        read_task("rte", str(tmp_path))
    (tmp_path / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    with pytest.raises(UserError, match="labels that are not entailment, not_entailment"):
        read_task("rte", str(tmp_path))
    (tmp_path / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\n")
    with pytest.raises(UserError, match="0 whole lines of 1"):
        read_task("rte", str(tmp_path))
    with pytest.raises(UserError, match="cannot load"):
        finetune(str(tmp_path / "none"), rte, tmp_path / "out")
    damaged = shutil.copytree(model, tmp_path / "damaged")
    os.truncate(damaged / "model.safetensors", 100)
    with pytest.raises(UserError, match="cannot load.*damaged"):
        finetune(str(damaged), rte, tmp_path / "out")
    with pytest.raises(UserError, match="unknown attention"):
        finetune(model, rte, tmp_path / "out", "--attention", "sparse")
    with pytest.raises(UserError, match="--epochs must be positive"):
        finetune(model, rte, tmp_path / "out", "--epochs", "0")
    assert len(TASKS) == 9
