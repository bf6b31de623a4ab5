"""Times whole training steps of Hrrformer against the original's network in JAX, in paired runs.

    python3 -m venv /tmp/jaxenv && /tmp/jaxenv/bin/pip install jax flax hrr optax
    python -m tools.benchmark_hrr_steps --jax-python /tmp/jaxenv/bin/python --json benchmarks/hrr_steps_cpu.json

A step is forward pass, loss, backward pass and Adam, of the presets `single`, at full length, with dropout
(`tools.hrr_networks`). Both networks have a process of their own, on the same cores, and are stopped while the other
works; a ratio is the median over rounds of JAX's time by ours in the same round. Before they are timed, loss and
gradients must agree, from the same weights and tokens, without dropout.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.cli import CommandParser, run_command
from runtime.errors import RunError
from tools.benchmark_hrr_jax import TOLERANCE, jax_versions
from tools.benchmarking import Worker, describe_machine, write_json

TASKS = ("image", "text")


def largest_difference(workers: dict[str, Worker], folder: Path) -> float:
    """Between the losses and gradients of the two, relative to the largest entry of each; RunError above TOLERANCE."""
    for name, worker in workers.items():
        worker.ask("check", str(folder / f"{name}.npz"))
    ours, theirs = (dict(np.load(folder / f"{name}.npz")) for name in workers)
    error = max(float(np.abs(ours[key] - theirs[key]).max() / np.abs(ours[key]).max()) for key in ours)
    if not error <= TOLERANCE:
        raise RunError(f"the network in JAX differs from ours by {error:.1e}")
    return error


def compare(workers: dict[str, Worker], batch: int, rounds: int, steps: int) -> dict[str, float]:
    times = {name: [] for name in workers}
    for _ in range(rounds + 1):  # the first round warms up
        for name, worker in workers.items():
            times[name].append(worker.ask("time", str(steps)))
    row = {}
    for clock in ("wall", "cpu"):
        ours, theirs = ([answer[clock] for answer in times[name][1:]] for name in workers)
        row[f"{clock}_ms"] = round(statistics.median(ours), 1)
        row[f"jax_{clock}_ms"] = round(statistics.median(theirs), 1)
        row[f"{clock}_ratio"] = round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 2)
    return row | {"examples_per_sec": round(1e3 * batch / row["wall_ms"], 1)}


def main(argv: Sequence[str]) -> None:
    summary = __doc__.splitlines()[0]
    parser = CommandParser(prog="python -m tools.benchmark_hrr_steps", description=summary)
    parser.add_argument("--jax-python", default="/tmp/jaxenv/bin/python", help="a python with jax, flax, hrr and optax")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--batch-size", type=int, default=8, help="examples in a step")
    parser.add_argument("--threads", type=int, default=2, help="cores that each network may use")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="also write the results here")
    args = parser.parse_args(argv)
    tasks = args.tasks.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; available: {', '.join(TASKS)}")
    for name in ("batch_size", "threads", "rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")

    record = {"machine": describe_machine(args.threads) | jax_versions(args.jax_python)}
    record |= {name: getattr(args, name) for name in ("batch_size", "rounds", "steps")} | {"results": []}
    for task in tasks:
        pythons = {"ours": sys.executable, "jax": args.jax_python}
        sizes = args.threads, task, args.batch_size
        workers = {
            name: Worker(name, python, "hrr_networks.py", *sizes, JAX_PLATFORMS="cpu")
            for name, python in pythons.items()
        }
        with tempfile.TemporaryDirectory() as folder:
            error = largest_difference(workers, Path(folder))
        row = {"task": task, "error": error} | compare(workers, args.batch_size, args.rounds, args.steps)
        for worker in workers.values():
            worker.close()
        record["results"].append(row)
        print(row, flush=True)
    if args.json is not None:
        write_json(args.json, record)


if __name__ == "__main__":
    sys.exit(run_command(main))
