"""Times the HRR self-attention layer against the original in JAX and against dense attention, in paired runs.

    python3 -m venv /tmp/jaxenv && /tmp/jaxenv/bin/pip install jax flax hrr
    python -m tools.benchmark_hrr_jax --jax-python /tmp/jaxenv/bin/python --json benchmarks/hrr_vs_jax_cpu.json

Every layer (`tools.hrr_layers`) has a process of its own, on the same cores, and is stopped while another one works. A
round runs each of them once; a ratio is the median over rounds of a layer's time by ours in the same round, of wall
time and of processor time. Before it is timed, every HRR layer must give the outputs and gradients of ours, from the
same weights and tokens. `--growth` also measures, in fresh processes, how our layer's time and the growth of its peak
resident size grow with the number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import numpy as np
import torch

from runtime.errors import RunError, UserError
from tools.benchmarking import Worker, describe_machine, growth_exponent, seconds_per_operation, write_json
from tools.hrr_layers import LAYERS, PASSES

TOLERANCE = 1e-4  # of the largest entry: two orders of summation in float32
KEEP_MEMORY = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"


def start_worker(name: str, args: argparse.Namespace) -> Worker:
    """The process of one layer."""
    python = args.jax_python if name.startswith("jax") else sys.executable
    environment = {"JAX_PLATFORMS": "cpu"} | ({"GLIBC_TUNABLES": KEEP_MEMORY} if name == "jax-kept" else {})
    return Worker(name, python, "hrr_layers.py", args.threads, args.dim, args.heads, **environment)


def jax_versions(python: str) -> dict[str, str]:
    """Of jax, flax and hrr there; UserError without them."""
    code = "import importlib.metadata as m, jax, flax, HRR; print(*map(m.version, ('jax', 'flax', 'hrr')))"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"{python} is no python with jax, flax and hrr: make one as --help says.") from None
    return dict(zip(("jax", "flax", "hrr"), result.stdout.split(), strict=True))


def check(workers: dict[str, Worker], tokens: int) -> dict[str, float]:
    """How far outputs and gradients of the other HRR layers are from ours, relative to the largest entry."""
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in workers.keys() - {"dense"}:
            workers[name].ask("check", "fb", tokens, f"{folder}/{name}.npz")
        ours = dict(np.load(f"{folder}/ours.npz"))
        for name in workers.keys() - {"dense", "ours"}:
            theirs = np.load(f"{folder}/{name}.npz")
            errors[name] = max(float(np.abs(ours[key] - theirs[key]).max() / np.abs(ours[key]).max()) for key in ours)
            if not errors[name] <= TOLERANCE:
                raise RunError(f"{name!r} differs from ours by {errors[name]:.1e} at {tokens} tokens")
    return errors


def compare(workers: dict[str, Worker], passes: str, tokens: int, repeats: int) -> dict[str, dict[str, object]]:
    """Times of every layer, and their ratios to ours."""
    times = {name: [] for name in workers}
    for _ in range(repeats + 1):  # the first round warms up
        for name, worker in workers.items():
            times[name].append(worker.ask("time", passes, tokens))
    rows = {name: {} for name in workers}
    for name, row in rows.items():
        for clock in ("wall", "cpu"):
            values, ours = ([round_[clock] for round_ in times[layer][1:]] for layer in (name, "ours"))
            ratios = [a / b for a, b in zip(values, ours, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row[f"{clock}_ms"] = round(statistics.median(values), 1)
            row[f"{clock}_least_ms"] = round(min(values), 1)
            row[f"{clock}_ratio"] = round(statistics.median(ratios), 2)
            row[f"{clock}_ratio_quartiles"] = [round(low, 2), round(high, 2)]
    return rows


def arithmetic_ms(passes: str, tokens: int, args: argparse.Namespace) -> float:
    """What our layer's products of matrices take at the speed of large ones here.

    3.6 N C² multiply-adds forward and 9 N C² backward (`attention.hrr.folded`).
    """
    operations = 2 * (3.6 + 9 * (passes == "fb")) * tokens * args.dim**2
    return 1e3 * operations * seconds_per_operation(torch.float32, args.threads)[0]


def print_rows(title: str, rows: dict[str, dict[str, object]]) -> None:
    columns = ("wall_ms", "wall_least_ms", "cpu_ms", "wall_ratio", "cpu_ratio")
    labels = ("ms", "least ms", "cpu ms", "ms/ours", "cpu/ours")
    print(f"\n{title:36}" + "".join(f"{label:>10}" for label in labels))
    for name, row in rows.items():
        print(f"  {name:34}" + "".join(f"{row[column]:10}" for column in columns), flush=True)


def measure_growth(args: argparse.Namespace) -> list[dict[str, float]]:
    """Time and memory of our layer, forward and backward, with exponents from the first length to each other."""
    rows = []
    for tokens in args.growth:
        worker = start_worker("ours", args)
        row = {"tokens": tokens, "peak_growth_mb": round(worker.ask("peak", "fb", tokens)["megabytes"], 1)}
        times = [worker.ask("time", "fb", tokens) for _ in range(args.repeats if tokens <= 1 << 18 else 3)]
        worker.close()
        row |= {f"{clock}_ms": round(statistics.median(t[clock] for t in times), 1) for clock in ("wall", "cpu")}
        for quantity in ("wall_ms", "cpu_ms", "peak_growth_mb") if rows else ():
            row[f"{quantity}_exponent"] = growth_exponent(rows[0], row, quantity, "tokens")
        rows.append(row)
        print(row, flush=True)
    return rows


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    summary, environment = __doc__.splitlines()[0], __doc__.splitlines()[2].strip()
    parser = CommandParser(prog="python -m tools.benchmark_hrr_jax", description=f"{summary} Needs: {environment}")
    parser.add_argument("--jax-python", default="/tmp/jaxenv/bin/python", help="a python with jax, flax and hrr")
    layers = f"to compare with ours, of {', '.join(LAYERS)}"
    parser.add_argument("--layers", default="jax,jax-kept,keeping,plain", help=layers)
    parser.add_argument("--tokens", default="4096,16384", help="lengths to compare at")
    parser.add_argument("--growth", default="", help="lengths to measure ours at, such as 4096,65536,1048576")
    parser.add_argument("--passes", default="f,fb", help="f = forward, fb = forward and backward; both: f,fb")
    parser.add_argument("--threads", type=int, default=2, help="cores that every layer may use")
    parser.add_argument("--dim", type=int, default=256, help="channels")
    parser.add_argument("--heads", type=int, default=4, help="heads")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="also write the results here")
    args = parser.parse_args(argv)
    args.layers, args.passes = (list(filter(None, x.split(","))) for x in (args.layers, args.passes))
    try:
        args.tokens, args.growth = ([int(n) for n in filter(None, x.split(","))] for x in (args.tokens, args.growth))
    except ValueError:
        parser.error("--tokens and --growth take numbers separated by commas")
    if min([*args.tokens, *args.growth, args.threads, args.dim, args.heads], default=1) < 1:
        parser.error("lengths, threads, channels and heads must be positive")
    for unknown, valid in ((set(args.layers) - set(LAYERS), LAYERS), (set(args.passes) - set(PASSES), PASSES)):
        if unknown:
            parser.error(f"unknown {', '.join(sorted(unknown))}; available: {', '.join(valid)}")
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    names = ["ours", *(name for name in args.layers if name != "ours")]
    record = {"machine": describe_machine(args.threads), "layers": {name: LAYERS[name] for name in names}}
    record |= {name: getattr(args, name) for name in ("dim", "heads", "repeats")} | {"results": []}
    if any(name.startswith("jax") for name in names):
        record["machine"] |= jax_versions(args.jax_python)
    workers = {name: start_worker(name, args) for name in names}
    for tokens in args.tokens:
        errors = check(workers, tokens)
        for passes in args.passes:
            rows = compare(workers, passes, tokens, args.repeats)
            print_rows(f"{tokens} tokens, {PASSES[passes]}", rows)
            result = {"tokens": tokens, "pass": PASSES[passes], "errors": errors, "layers": rows}
            record["results"].append(result | {"arithmetic_ms": round(arithmetic_ms(passes, tokens, args), 1)})
    for worker in workers.values():
        worker.close()
    record["growth"] = measure_growth(args)
    if args.json is not None:
        write_json(args.json, record)


if __name__ == "__main__":
    sys.exit(run_command(main))
