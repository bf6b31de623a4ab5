"""Markdown tables of what `tools.compare_mechanisms` recorded: scores beside the published ones, and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.published_scores import PUBLISHED, published

Row = Mapping[str, Any]


def score_table(record: Mapping[str, Any]) -> str:
    """Test accuracy in % and what the paper has, a pair of columns a task; "not run" where there is no result."""
    header = ["mechanism"] + [title for task in record["tasks"] for title in (task, "paper")]

    def cells(task: str, row: Row | None, mechanism: str) -> list[str]:
        paper = published(mechanism, task)
        return [f"{100 * row['test_accuracy']:.1f}" if row else "not run", "-" if paper is None else f"{paper:.2f}"]

    baselines = [cell for task in record["tasks"].values() for cell in (f"{100 * task['majority_baseline']:.1f}", "-")]
    lines = _rows(record, cells) + [["majority class", *baselines]]
    return f"{_table(header, lines)}\n\n{_errors(record)}"


def cost_table(record: Mapping[str, Any]) -> str:
    """Parameters, CPU seconds of the whole run, training examples a second and peak memory of every run."""
    header = ["mechanism"]
    for task in record["tasks"]:
        header += [f"{task}: parameters", "CPU s", "examples/s", "GiB"]

    def cells(task: str, row: Row | None, mechanism: str) -> list[str]:
        if row is None:
            return ["not run"] * 4
        cpu_sec = "unknown" if row["cpu_sec"] is None else f"{row['cpu_sec']:.0f}"
        return [f"{row['parameters']:,}", cpu_sec, f"{row['examples_per_sec']:.0f}", f"{row['peak_memory_gib']:.2f}"]

    return _table(header, _rows(record, cells))


def _rows(record: Mapping[str, Any], cells: Callable[[str, Row | None, str], list[str]]) -> list[list[str]]:
    """A line for every mechanism with a result, in the order of the paper's table."""
    found = {(row["task"], row["mechanism"]): row for row in record["results"]}
    measured = {mechanism for _, mechanism in found}
    names = [*(name for name in PUBLISHED if name in measured), *sorted(measured - PUBLISHED.keys())]
    return [
        [name] + [c for task in record["tasks"] for c in cells(task, found.get((task, name)), name)] for name in names
    ]


def standard_error(rows: Sequence[Row]) -> float:
    """What chance alone does to a score in %, or to the mean of several: its deviation, from the examples tested."""
    variances = [row["test_accuracy"] * (1 - row["test_accuracy"]) / row["test_examples"] for row in rows]
    return 100 * math.sqrt(sum(variances)) / len(rows)


def _errors(record: Mapping[str, Any]) -> str:
    texts = []
    for task in record["tasks"]:
        error = max(standard_error([row]) for row in record["results"] if row["task"] == task)
        texts.append(f"{error:.1f} in {task}")
    return f"Standard error of a score at most {', '.join(texts)}."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
