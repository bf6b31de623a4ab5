"""Dense and SMYRF attention exchanged after fine-tuning on IMDB, and accuracy against attention memory.

    python -m tools.exchange_text --model MODEL --data aclImdb --work runs/exchange --out benchmarks/exchange_imdb.json

The table of Daras et al. 2020 (arXiv:2010.05315, section 5.2): for every seed one model is trained with dense and one
with SMYRF attention, on the same reviews, and each is evaluated with both. Then the models that were trained dense are
evaluated with every setting of --curve, without retraining. Attention memory is what the paper counts: scores, rounds x
clusters x cluster², as a share of N² at the longest text.

The work folder keeps the models and every cell; the same command resumes. The JSON and the plot are written anew after
every cell. Seeds differ in training reviews, their order, the new head and dropout; test reviews are the same for all.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import numpy as np
import torch

from tools.benchmarking import describe_machine
from tools.finetune_text import draw, refuse_other_config, require_packages, save_model, write_json
from tools.plotting import check_png, pyplot, save
from tools.text_tasks import read_task

if TYPE_CHECKING:
    from tools.text_models import Attention

CURVE = ["8x16", "4x16", "1x16", "4x32", "2x32", "1x32", "2x64", "1x64"]
TEST_SEED = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
        UserError: data or a model that is not there, packages that are missing, an unknown attention, or a work folder
            that holds other work.
    """
    parser = CommandParser(prog="python -m tools.exchange_text", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, or name on the hub, of a pretrained transformer")
    parser.add_argument("--data", required=True, help="aclImdb, as a folder or an archive, or 'hub'")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and cells; resumes")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG of the curve")
    parser.add_argument("--attention", default="smyrf:4x32:union", help="what is exchanged for dense attention")
    parser.add_argument("--curve", nargs="*", default=CURVE, help="ROUNDSxCLUSTER, each with both merges")
    parser.add_argument("--curve-seeds", type=int, default=1, help="models that the curve is measured on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-reviews", type=int, default=2000)
    parser.add_argument("--test-reviews", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=256, help="tokens a review; longer ones are cut")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--freeze-layers", type=int, default=0, help="keep the embeddings and so many first layers")
    parser.add_argument("--dropout", type=float, help="of all dropout layers (None: the model's own)")
    args = parser.parse_args(argv)
    for name in ("seeds", "train_reviews", "test_reviews", "max_length", "batch_size", "epochs"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if not 0 <= args.curve_seeds <= args.seeds:
        parser.error("--curve-seeds cannot be more than --seeds")
    if args.plot is not None:
        check_png(args.plot)
    require_packages()
    from tools.text_models import Attention

    kinds = [Attention.parse("dense"), Attention.parse(args.attention)]
    # Where there is one round, no key is met twice, and the merges are the same.
    merges = {text: ("union",) if text.startswith("1x") else ("union", "multiset") for text in args.curve}
    curve = [Attention.parse(f"smyrf:{text}:{merge}") for text, names in merges.items() for merge in names]
    keys = ("model", "max_length", "train_reviews", "test_reviews", "epochs", "learning_rate", "batch_size")
    config = {key: getattr(args, key) for key in (*keys, "freeze_layers", "dropout")}
    refuse_other_config(args.work, config)
    write_json(args.work / "config.json", config)

    work = _Work(args.work, args.data, config)
    cells = [
        (seed, trained, used)
        for seed in range(args.seeds)
        for trained in kinds
        for used in sorted(kinds, key=lambda kind: kind != trained)  # first what the others are compared with
    ]
    cells += [(seed, kinds[0], used) for seed in range(args.curve_seeds) for used in curve]
    cells = list(dict.fromkeys(cells))
    for done, (seed, trained, used) in enumerate(cells, 1):
        if not work.measure(seed, trained, used):
            print(f"stopped; the same command resumes the work in {args.work}.")
            return 0
        say = f"[{done}/{len(cells)}] seed {seed}, trained {trained}, evaluated {used}"
        print(f"{say}: {100 * work.accuracy(seed, trained, used):.2f}%", flush=True)
        record = summarise(work, cells[:done], kinds, curve, config)
        write_json(args.out, record)
        if args.plot is not None and record["curve"]:
            plot(record, args.plot)
    print(f"wrote {args.out}\n\n{table(record)}")
    return 0


class _Work:
    """The models and predictions in a folder, made where they are missing."""

    def __init__(self, folder: Path, data: str, config: dict[str, Any]) -> None:
        from tools.text_models import encode, load_tokenizer

        self.folder, self.config = folder, config
        self.tokenizer = load_tokenizer(config["model"])
        self.task, self.examples = read_task("imdb", data)
        test = draw(self.examples["test"], config["test_reviews"], TEST_SEED)
        self.test_rows = encode(self.tokenizer, test, config["max_length"], "test")
        self.labels = np.array(test.labels)
        self.loaded: tuple[Path, Any] | None = None
        path = folder / "predictions.json"
        self.predictions: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}

    def measure(self, seed: int, trained: Attention, used: Attention) -> bool:
        """Predicts the test reviews, unless that was done; False where the process was asked to stop in training."""
        from tools.text_models import predict

        key = _key(seed, trained, used)
        if key in self.predictions:
            return True
        model = self._model(seed, trained)
        if model is None:
            return False
        outputs = predict(model, self.tokenizer, self.test_rows, used, 2 * self.config["batch_size"])
        self.predictions[key] = "".join(map(str, outputs.argmax(axis=1)))
        write_json(self.folder / "predictions.json", self.predictions)
        return True

    def accuracy(self, seed: int, trained: Attention, used: Attention) -> float:
        predicted = np.array(list(self.predictions[_key(seed, trained, used)]), dtype=int)
        return float(np.mean(predicted == self.labels))

    def _model(self, seed: int, attention: Attention) -> Any | None:
        from tools.text_models import Training, encode, load_model, seed_everything, train

        folder = self.folder / f"seed{seed}-{attention}".replace(":", "-")
        if self.loaded is not None and self.loaded[0] == folder:
            return self.loaded[1]
        seed_everything(seed)
        if (folder / "model").is_dir():
            model = load_model(str(folder / "model"), self.task.num_outputs)
        else:
            model = load_model(self.config["model"], self.task.num_outputs)
            examples = draw(self.examples["train"], self.config["train_reviews"], seed)
            rows = encode(self.tokenizer, examples, self.config["max_length"], "train")
            keys = ("epochs", "learning_rate", "batch_size", "freeze_layers", "dropout")
            training = Training(str(attention), seed=seed, **{key: self.config[key] for key in keys})
            if not train(model, self.tokenizer, rows, training, folder / "checkpoints", 500):
                return None
            save_model(model, self.tokenizer, folder / "model")
            shutil.rmtree(folder / "checkpoints")
        self.loaded = (folder, model)
        return model


def _key(seed: int, trained: Attention, used: Attention) -> str:
    return f"seed {seed}, trained {trained}, evaluated {used}"


def summarise(
    work: _Work,
    cells: Iterable[tuple[int, Attention, Attention]],
    kinds: Sequence[Attention],
    curve: Sequence[Attention],
    config: dict[str, Any],
) -> dict[str, Any]:
    """Accuracies in percent by seed, their mean, and differences to dense inference of the same models."""
    import transformers

    found: dict[tuple[Attention, Attention], dict[int, float]] = {}
    for seed, trained, used in cells:
        found.setdefault((trained, used), {})[seed] = 100 * work.accuracy(seed, trained, used)

    def row(trained: Attention, used: Attention) -> dict[str, Any]:
        by_seed, same = found[trained, used], found[trained, trained]
        differences = [by_seed[seed] - same[seed] for seed in by_seed]
        return {
            "trained": str(trained),
            "evaluated": str(used),
            "memory": round(used.memory(config["max_length"]), 4),
            "accuracy": {seed: round(value, 2) for seed, value in by_seed.items()},
            "mean": round(statistics.mean(by_seed.values()), 2),
            "difference": round(statistics.mean(differences), 2),
        }

    dense = kinds[0]
    lengths = [len(example["input_ids"]) for example in work.test_rows]
    record = {
        "machine": describe_machine(torch.get_num_threads()) | {"transformers": transformers.__version__},
        "config": config | {"model": Path(config["model"]).parent.name or config["model"]},
        "test tokens": {"mean": round(statistics.mean(lengths), 1), "cut": sum(n == max(lengths) for n in lengths)},
        "memory": "rounds x clusters x cluster^2 / N^2 at the longest text",
        "difference": "points to evaluation with the attention of training, mean over seeds",
        "exchange": [row(t, u) for t in kinds for u in kinds if (t, u) in found],
    }
    points = [row(dense, used) for used in dict.fromkeys((*curve, kinds[1])) if (dense, used) in found]
    record["dense"] = round(statistics.mean(found[dense, dense].values()), 2)
    record["curve"] = sorted(points, key=lambda point: (point["memory"], point["evaluated"]))
    return record


def table(record: dict[str, Any]) -> str:
    """The exchange and the curve in Markdown."""
    names = list(dict.fromkeys(row["trained"] for row in record["exchange"]))
    seeds = max(len(row["accuracy"]) for row in record["exchange"])
    lines = [f"Accuracy in percent, mean of {seeds} seeds:", "", "| trained \\ evaluated | " + " | ".join(names) + " |"]
    lines.append("| --- " * (len(names) + 1) + "|")
    for name in names:
        cells = [
            f"{row['mean']:.2f} ({row['difference']:+.2f})" for row in record["exchange"] if row["trained"] == name
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"Models trained dense ({record['dense']:.2f}), evaluated with less attention memory:", ""]
    lines += ["| attention | memory | accuracy | difference | seeds |", "| --- | --- | --- | --- | --- |"]
    for row in record["curve"]:
        memory, numbers = f"{100 * row['memory']:.0f}%", f"{row['mean']:.2f} | {row['difference']:+.2f}"
        lines.append(f"| {row['evaluated']} | {memory} | {numbers} | {len(row['accuracy'])} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """The difference to dense attention over attention memory, a line for each cluster size and merge."""
    figure, axis = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for point in record["curve"]:
        _, sizes, merge = point["evaluated"].split(":")
        rounds, cluster = map(int, sizes.split("x"))
        for name in ("union", "multiset") if rounds == 1 else (merge,):
            lines.setdefault((cluster, name), []).append((100 * point["memory"], point["difference"]))
    sizes = sorted({cluster for cluster, _ in lines})
    for (cluster, merge), points in sorted(lines.items()):
        style = {"color": f"C{sizes.index(cluster)}", "linestyle": "-" if merge == "union" else "--"}
        label = f"clusters of {cluster}, {merge}"
        axis.plot(*zip(*sorted(points), strict=True), marker="o" if merge == "union" else "x", label=label, **style)
    axis.axhline(0, color="grey", linewidth=1)
    axis.set(xscale="log", xlabel="attention memory, % of dense", ylabel="accuracy, points to dense attention")
    ticks = sorted({round(100 * point["memory"], 1) for point in record["curve"]})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    config = record["config"]
    axis.set_title(f"IMDB, {config['max_length']} tokens, trained dense ({record['dense']:.1f}%), not retrained")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save(figure, path, dpi=110)


if __name__ == "__main__":
    sys.exit(run_command(main))
