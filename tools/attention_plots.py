"""Plots of what was measured: time over length, and the figure of all mechanisms.

Times are from `tools.benchmark_attention` or `tools.benchmark_layers`, scores from `tools.compare_mechanisms`.

python -m tools.attention_plots crossover benchmarks/attention_lengths_cpu.json docs/crossover.png
python -m tools.attention_plots figure benchmarks/mechanism_layers_cpu.json benchmarks/mechanisms_cpu.json OUT.png
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.cli import CommandParser, run_command
from tools.benchmarking import machine_title, read_json
from tools.mechanism_figure import draw_figure
from tools.plotting import pyplot, save

PASS_TITLES = {"f": "forward", "fb": "forward + backward"}


def crossing(lengths: Sequence[int], times: Sequence[float], baseline: Sequence[float]) -> float | None:
    """The length from which on `times` stays below `baseline`, between two lengths by a line in logarithms.

    None where it never does, or did from the first length on.
    """
    gaps = [math.log(a / b) for a, b in zip(times, baseline, strict=True)]
    after = len(gaps)
    while after and gaps[after - 1] < 0:
        after -= 1
    if after in (0, len(gaps)):
        return None
    share = gaps[after - 1] / (gaps[after - 1] - gaps[after])
    low, high = math.log(lengths[after - 1]), math.log(lengths[after])
    return math.exp(low + share * (high - low))


def plot_crossover(record: Mapping[str, Any], out: Path) -> None:
    """Time over the number of queries, a panel for each pass, with the crossings of the dense line marked."""
    plt = pyplot()
    rows = record["results"]
    passes = [name for name in PASS_TITLES if any(row["pass"] == name for row in rows)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(passes), figsize=(6 * len(passes), 4.5), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], passes, strict=True):
        series = {
            method: {row["length"]: row["median_ms"] for row in rows if (row["method"], row["pass"]) == (method, name)}
            for method in methods
        }
        for method, points in series.items():
            style = {"color": "black", "linewidth": 2.5} if method == "dense" else {}
            (line,) = axis.plot(points.keys(), points.values(), marker="o", label=method, **style)
            baseline = series.get("dense", {})
            shared = sorted(points.keys() & baseline.keys())
            values, dense = ([x[length] for length in shared] for x in (points, baseline))
            at = crossing(shared, values, dense) if method != "dense" else None
            if at is not None:
                axis.axvline(at, color=line.get_color(), linestyle=":")
                place = {"transform": axis.get_xaxis_transform(), "rotation": 90, "va": "bottom", "ha": "right"}
                axis.text(at, 0.02, f"{at:,.0f}", color=line.get_color(), **place)
        lengths = sorted({row["length"] for row in rows})
        axis.set(xscale="log", yscale="log", xlabel="queries", ylabel="ms", title=PASS_TITLES[name])
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(machine_title(record))
    save(figure, out, dpi=120)


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m tools.attention_plots", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    crossover = commands.add_parser("crossover", help="time over length")
    figure = commands.add_parser("figure", help="score over speed, memory as the circle")
    for command in (crossover, figure):
        command.add_argument("results", type=Path, help="JSON of tools.benchmark_attention, or of benchmark_layers")
    figure.add_argument("scores", type=Path, help="JSON of tools.compare_mechanisms")
    for command in (crossover, figure):
        command.add_argument("out", type=Path, help="PNG to write")
    args = parser.parse_args(argv)
    if args.command == "crossover":
        plot_crossover(read_json(args.results), args.out)
    else:
        draw_figure(args.results, args.scores, args.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
