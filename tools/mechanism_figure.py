"""The figure of all mechanisms: score over speed, memory as the circle's area.

Speed and memory are from `tools.benchmark_layers`, scores from `tools.compare_mechanisms`:

python -m tools.benchmark_attention --figure benchmarks/mechanism_layers_cpu.json benchmarks/mechanisms_cpu.json OUT.png
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attention import get_mechanism
from runtime.errors import UserError
from tools.benchmarking import machine_title, read_json
from tools.mechanism_tables import standard_error
from tools.plotting import pyplot, save

KIND_COLORS = {
    "exact": "black",
    "approximation": "tab:blue",
    "pattern": "tab:green",
    "content": "tab:orange",
    "other": "tab:red",
}


def draw_figure(layers: Path, scores: Path, out: Path) -> None:
    """`plot_figure` from files; UserError where one is missing or is not what its tool writes."""
    records = read_json(layers), read_json(scores)
    try:
        plot_figure(*records, out)
    except (KeyError, TypeError):
        raise UserError(
            f"{layers} must be of tools.benchmark_layers, and {scores} of tools.compare_mechanisms."
        ) from None


def plot_figure(record: Mapping[str, Any], scores: Mapping[str, Any], out: Path) -> None:
    """Score over speed, memory as the circle's area, of all that have both.

    At the longest length at which all of these were measured; who needs too much memory for longer ones sets it.

    Args:
        record: what `tools.benchmark_layers` writes.  scores: what `tools.compare_mechanisms` writes.

    Raises:
        UserError: no mechanism is in both.
    """
    plt = pyplot()
    at_length: dict[int, list[Mapping[str, Any]]] = {}
    for row in record["results"]:
        if row["pass"] == "fb" and row["method"] in scores["scores"]:
            at_length.setdefault(row["length"], []).append(row)
    if not at_length:
        raise UserError("no mechanism has both a measured time and a score.")
    most = max(map(len, at_length.values()))
    length = max(n for n, rows in at_length.items() if len(rows) == most)
    figure, axis = plt.subplots(figsize=(10, 6.5), layout="constrained")
    largest, points = max(row["peak_growth_mb"] for row in at_length[length]), {}
    for row in at_length[length]:
        name, size = row["method"], 25 + 2000 * row["peak_growth_mb"] / largest
        points[name], color = (1e3 / row["median_ms"], scores["scores"][name]), KIND_COLORS[get_mechanism(name).kind]
        axis.scatter(*points[name], s=size, color=color, alpha=0.55, linewidths=0)
        runs = [run for run in scores["results"] if run["mechanism"] == name]
        axis.errorbar(*points[name], standard_error(runs), color="grey", linewidth=0.6)
    for kind, color in KIND_COLORS.items():
        axis.scatter([], [], color=color, alpha=0.55, label=kind)
    axis.legend(title="kind", fontsize=8, title_fontsize=8)
    axis.set(
        xscale="log",
        xlabel=f"layers a second at {length:,} tokens, forward + backward",
        ylabel=f"test accuracy in %, mean of {', '.join(scores['tasks'])}; bars: standard error",
    )
    axis.margins(0.12)
    axis.grid(alpha=0.3, which="both")
    axis.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_title(f"{machine_title(record)}; area: peak memory, the largest {largest:,.0f} MB", fontsize=10)
    _label(figure, axis, points)
    save(figure, out, dpi=120)


def _label(figure: Any, axis: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """A name beside each point, at the nearest place where it covers no other name and no point."""
    figure.canvas.draw()  # settles the limits: places are compared in pixels
    pixels = {name: axis.transData.transform(point) for name, point in points.items()}
    middle, room = (axis.bbox.x0 + axis.bbox.x1) / 2, axis.bbox.width / 2
    taken = [(x, y, 8, 8) for x, y in pixels.values()]  # boxes: centre, width, height
    for name, (x, y) in pixels.items():
        width, height = 7 * len(name) + 4, 14
        for distance, degrees in itertools.product(range(6, 200, 6), range(0, 360, 30)):
            turn = math.radians(degrees)
            at_x, at_y = x + (distance + width / 2) * math.cos(turn), y + (distance + height / 2) * math.sin(turn)
            inside = abs(at_x - middle) < room - width / 2
            if inside and not any(
                abs(at_x - b[0]) < (width + b[2]) / 2 and abs(at_y - b[1]) < (height + b[3]) / 2 for b in taken
            ):
                break
        taken.append((at_x, at_y, width, height))
        line = {"arrowstyle": "-", "color": "grey", "linewidth": 0.6} if distance > 6 else None
        place = axis.transData.inverted().transform((at_x, at_y))
        axis.annotate(name, points[name], place, ha="center", va="center", fontsize=9, arrowprops=line)
