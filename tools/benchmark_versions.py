"""Times a training step of `biggan` on the CPU against other checkouts or other environments, in paired runs.

    git worktree add /tmp/before v1.0
    python -m tools.benchmark_versions --preset faces64 --against /tmp/before --environment GOMP_SPINCOUNT=0

Every version has a process of its own, on the same cores, and is stopped while the others work (`tools.gan_steps`); a
ratio is the median over rounds of its time by that of this checkout in the same round. All train the same run: the
numbers of its first step must agree.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

INHERITED = dict(os.environ)  # without what the next import sets: every checkout sets its own

from runtime.cli import CommandParser, run_command  # noqa: E402
from runtime.errors import RunError, UserError  # noqa: E402
from tools.benchmarking import Worker, describe_machine, write_json  # noqa: E402

HERE = Path(__file__).parents[1]
TOLERANCE = 1e-3  # 2e-5 is rounding's part: before the first step's losses are computed, Adam has taken steps


def checkout(text: str) -> Path:
    folder = Path(text).resolve()
    if not (folder / "biggan" / "training.py").is_file():
        raise UserError(f"{text} is no checkout of this repository; `git worktree add {text} COMMIT` makes one.")
    return folder


def commit(folder: Path) -> str | None:
    """What is checked out there, with -dirty where files differ from it."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None


def variables(text: str) -> dict[str, str]:
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name and separator for name, separator, _ in parts):
        raise UserError(f"--environment takes VARIABLE=VALUE, joined by commas; got {text!r}.")
    return {name: value for name, _, value in parts}


def start(name: str, folder: Path, sizes: Sequence[object], environment: Mapping[str, str]) -> Worker:
    set_here = dict.fromkeys(os.environ.keys() - INHERITED.keys())
    environment = set_here | {"PYTHONPATH": str(folder)} | environment
    return Worker(name, sys.executable, "gan_steps.py", folder, *sizes, **environment)


def difference(name: str, ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The largest of losses, logits and gradient norms, relative to them where above 1; RunError above TOLERANCE."""
    error = max(abs(ours[key] - theirs[key]) / max(abs(ours[key]), 1) for key in ours)
    if not error <= TOLERANCE:
        raise RunError(f"{name} does not train the same run: its first step's numbers differ by {error:.1e}")
    return error


def main(argv: Sequence[str]) -> None:
    summary = __doc__.splitlines()[0]
    parser = CommandParser(prog="python -m tools.benchmark_versions", description=summary)
    parser.add_argument("--preset", default="demo", help="network and recipe; every checkout has its own of this name")
    parser.add_argument("--against", action="append", default=[], metavar="FOLDER", help="another checkout")
    parser.add_argument(
        "--environment", action="append", default=[], metavar="VAR=VALUE,...", help="this checkout with such variables"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images a step")
    parser.add_argument("--threads", type=int, default=2, help="cores that each version may use")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each version")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="also write the results here")
    args = parser.parse_args(argv)
    for name in ("batch_size", "threads", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    versions = {"here": (HERE, {})}
    versions |= {text: (checkout(text), {}) for text in args.against}
    versions |= {text: (HERE, variables(text)) for text in args.environment}

    sizes = args.threads, args.preset, args.batch_size
    workers = {name: start(name, folder, sizes, extra) for name, (folder, extra) in versions.items()}
    first = {}
    for name, worker in workers.items():
        worker.ask("time")
        first[name] = worker.ask("values")
    errors = {name: difference(name, first["here"], values) for name, values in first.items()}
    times = {name: [] for name in workers}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, worker in workers.items():
            times[name].append(worker.ask("time"))
    for worker in workers.values():
        worker.close()

    record = {"machine": describe_machine(args.threads)}
    record |= {name: getattr(args, name) for name in ("preset", "batch_size", "rounds")} | {"results": []}
    for name in versions:
        row = {"version": name, "commit": commit(versions[name][0]), "difference": errors[name]}
        for clock in ("wall", "cpu"):
            ours, theirs = ([answer[clock] for answer in times[key][1:]] for key in ("here", name))
            row[f"{clock}_ms"] = round(statistics.median(theirs), 1)
            row[f"{clock}_ratio"] = round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3)
        record["results"].append(row)
        print(row, flush=True)
    if args.json is not None:
        write_json(args.json, record)


if __name__ == "__main__":
    sys.exit(run_command(main))
