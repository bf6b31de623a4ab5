"""Text classification: the GLUE tasks and IMDB, from their official files or the Hugging Face hub.

GLUE: Wang et al. 2019, https://arxiv.org/abs/1804.07461; the archives of https://gluebenchmark.com/tasks unpack to a
folder a task (CoLA, SST-2, ...) of tab-separated files. IMDB: Maas et al. 2011, read as `hrrformer` reads it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hrrformer.tasks import get_task
from runtime.errors import UserError

LONGEST_REVIEW = 1 << 20  # bytes


@dataclass(frozen=True)
class TextTask:
    """A task.

    Args:
        columns: of the official files: the texts (one or two) and the label. Numbers where files have no header.
        classes: what the label column holds for each class, in the hub's order; none for a number to regress on.
        metrics: names in `tools.text_metrics.METRICS`, as GLUE defines them.
        splits: the splits that are evaluated, {name: file}.
        hub: data set and configuration on the hub.  hub_columns: the texts there; the label is "label".
    """

    name: str
    folder: str
    columns: tuple[str | int, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, str]
    hub: tuple[str, ...]
    hub_columns: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        return len(self.classes) or 1


@dataclass(frozen=True)
class Examples:
    """Texts, second texts where the task has pairs, and labels: numbers of classes, or values to regress on."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]

    def take(self, indices: Sequence[int]) -> Examples:
        texts, labels = ([values[i] for i in indices] for values in (self.texts, self.labels))
        return Examples(texts, None if self.pairs is None else [self.pairs[i] for i in indices], labels)


def _glue(name: str, folder: str, columns: tuple, classes: Sequence[str], metrics: str, **options) -> TextTask:
    config, hub_columns = name.replace("-", ""), options.pop("hub_columns", ("sentence1", "sentence2"))
    splits = options.pop("splits", {"validation": "dev.tsv"})
    return TextTask(
        name, folder, columns, tuple(classes), tuple(metrics.split()), splits, ("nyu-mll/glue", config), hub_columns
    )


_PAIR = ("sentence1", "sentence2", "label")
_MNLI_SPLITS = {"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"}
_QQP = ("question1", "question2")
TASKS = {
    task.name: task
    for task in (
        _glue("cola", "CoLA", (3, 1), "01", "matthews", hub_columns=("sentence",)),
        _glue(
            "mnli",
            "MNLI",
            ("sentence1", "sentence2", "gold_label"),
            ("entailment", "neutral", "contradiction"),
            "accuracy",
            splits=_MNLI_SPLITS,
            hub_columns=("premise", "hypothesis"),
        ),
        _glue("mrpc", "MRPC", ("#1 String", "#2 String", "Quality"), "01", "accuracy f1"),
        _glue(
            "qnli",
            "QNLI",
            ("question", "sentence", "label"),
            ("entailment", "not_entailment"),
            "accuracy",
            hub_columns=("question", "sentence"),
        ),
        _glue("qqp", "QQP", (*_QQP, "is_duplicate"), "01", "accuracy f1", hub_columns=_QQP),
        _glue("rte", "RTE", _PAIR, ("entailment", "not_entailment"), "accuracy"),
        _glue("sst-2", "SST-2", ("sentence", "label"), "01", "accuracy", hub_columns=("sentence",)),
        _glue("sts-b", "STS-B", ("sentence1", "sentence2", "score"), "", "pearson spearman"),
        TextTask(
            "imdb",
            "aclImdb",
            (),
            get_task("text").class_names,
            ("accuracy",),
            {"test": "test"},
            ("stanfordnlp/imdb",),
            ("text",),
        ),
    )
}


def read_task(name: str, data: str) -> tuple[TextTask, dict[str, Examples]]:
    """A task and its examples, {"train" and the evaluated splits: examples}.

    Args:
        data: the task's folder or the one that holds it, for IMDB also its archive; or "hub".

    Raises:
        UserError: an unknown task, files that are missing or damaged, or a hub that cannot be reached.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; tasks are {', '.join(TASKS)}.")
    task = TASKS[name]
    if data == "hub":
        return task, {split: _from_hub(task, split) for split in ("train", *task.splits)}
    path = Path(data)
    if not path.exists():
        raise UserError(f"{path} does not exist; --data takes the folder {task.folder}, or 'hub'.")
    if name == "imdb":
        source = get_task("text").open(path, LONGEST_REVIEW)
        return task, {split: _from_reviews(source.read(split, 1)) for split in ("train", "test")}
    folder = path / task.folder if (path / task.folder).is_dir() else path
    return task, {
        split: _from_file(task, folder / file) for split, file in {"train": "train.tsv", **task.splits}.items()
    }


def _from_reviews(reviews) -> Examples:
    texts, labels = [], []
    for (text,), label in reviews:
        texts.append(text.decode("utf-8", "replace").replace("<br />", " "))
        labels.append(label)
    return Examples(texts, None, labels)


def _from_file(task: TextTask, path: Path) -> Examples:
    """GLUE's files quote nothing; a few lines of QQP lack columns, and are left out as everybody does."""
    if not path.is_file():
        raise UserError(f"{path} is missing; the folder {task.folder} of https://gluebenchmark.com/tasks is needed.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = task.columns
    if isinstance(columns[0], str):
        header = rows.pop(0) if rows else []
        missing = [column for column in columns if column not in header]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}; its first line is {header}.")
        columns = tuple(header.index(column) for column in columns)
    whole = [[row[c] for c in columns] for row in rows if len(row) > max(columns)]
    if len(whole) < max(0.99 * len(rows), 1):
        raise UserError(f"{path} holds {len(whole)} whole lines of {len(rows)}; it is empty, damaged, or another file.")
    try:
        labels = [task.classes.index(row[-1]) if task.classes else float(row[-1]) for row in whole]
    except ValueError:
        wanted = ", ".join(task.classes) or "numbers"
        raise UserError(f"{path} has labels that are not {wanted}; test files have none.") from None
    return Examples([row[0] for row in whole], [row[1] for row in whole] if len(columns) == 3 else None, labels)


def _from_hub(task: TextTask, split: str) -> Examples:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("--data hub needs the package datasets; install it with: pip install datasets") from None
    try:
        rows = load_dataset(*task.hub, split=split)
    except Exception as error:  # it raises many kinds, for lack of a network, a name, or space
        raise UserError(f"cannot load {'/'.join(task.hub)} from the hub: {error}") from None
    texts = [list(rows[column]) for column in task.hub_columns]
    return Examples(texts[0], texts[1] if len(texts) == 2 else None, list(rows["label"]))
