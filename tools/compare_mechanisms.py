"""Trains every mechanism on the same small part of the Long Range Arena's tasks, and tables what each reaches.

    python -m tools.compare_mechanisms --tasks image,text,listops --data image=cifar10.safetensors \\
        --data text=imdb.safetensors --out runs/mechanisms --json benchmarks/mechanisms_cpu.json

All mechanisms have one budget: the same examples in the same order, width, depth, batches, learning rates and steps.
Each run is `hrrformer train` in a process of its own, one at a time. The same command again goes on where it stopped:
finished runs are not repeated, an interrupted one resumes. Mechanisms have the options of their papers, which are their
defaults here, but for those that have none (OPTIONS); F-Net has its paper's norm (FLAGS). One that takes no mask sees
the padding as tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

from attention import available_attention, get_mechanism
from hrrformer.result import FILE as RESULT
from runtime.errors import RunError, UserError
from tools.benchmarking import describe_machine, write_json
from tools.mechanism_tables import cost_table, score_table
from tools.reduced_tasks import write_reduced

OPTIONS = {"smyrf": {"num_hashes": 2, "q_cluster_size": 64, "k_cluster_size": 64}}
# What F-Net's transform adds is sqrt(N C) times as large as the tokens: its paper normalises after it, not before.
FLAGS = {"fnet": ["--model.norm", "post"]}
USAGE = "usage.jsonl"  # in a run's folder: what each process that worked on it took


@dataclass(frozen=True)
class Budget:
    """What every mechanism gets; `flags` are those of `hrrformer train`, over the task's preset `single`."""

    length: int
    train_examples: int
    validation_examples: int
    test_examples: int
    flags: str


NETWORK = "--model.dim 64 --model.num-heads 2 --model.mlp-dim 128 --model.num-layers 1 --length-buckets none"
# Sines and cosines would be several times as large as the embeddings of the tokens, and learning slower.
PLACES = "--model.positions learned --model.norm pre --model.embedding-norm false"
# Noise on a thousand positions hides what their mean says of a text: with dropout the loss stays at chance for long.
RECIPE = "--epochs 1 --batch-size 8 --model.dropout 0 --optimizer.schedule cosine --optimizer.warmup-steps 50"
LOG = "--log.steps-per-tick 100 --log.validate-every-ticks 0 --log.checkpoint-every-ticks 2 --log.keep-checkpoints 1"
COMMON = f"{NETWORK} {PLACES} {RECIPE} {LOG}"
BUDGETS = {
    "image": Budget(1024, 5000, 200, 2000, f"{COMMON} --optimizer.lr 2e-3"),
    "text": Budget(1000, 10000, 200, 2000, f"{COMMON} --optimizer.lr 2e-3"),
    "listops": Budget(500, 8000, 200, 2000, f"{COMMON} --optimizer.lr 2e-3"),
}


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    record = {"machine": describe_machine(args.threads), "seed": args.seed, "tasks": {}, "results": []}
    failed = []
    for task in args.tasks:
        budget, data = args.budgets[task], args.data.get(task, "generated")
        packed = prepare(args.out / task, task, budget, data, args)
        for number, mechanism in enumerate(args.mechanisms, start=1):
            folder = args.out / task / mechanism
            command = train_command(task, mechanism, budget, packed, folder, args)
            if not (folder / RESULT).exists():
                print(f"{task}, {number} of {len(args.mechanisms)}: {mechanism}", file=sys.stderr, flush=True)
                if run_in_process(command, folder, args.threads):
                    failed.append(f"{mechanism} on {task}")
                    continue
            row = read_run(task, mechanism, folder) | {"command": shlex.join(["hrrformer", *command[3:]])}
            record["results"].append(row)
            baseline = row.pop("majority_baseline")
            record["tasks"][task] = asdict(budget) | {"data": data, "majority_baseline": baseline}
            write_json(args.json or args.out / "scores.json", record | {"scores": mean_scores(record)})
    if record["results"]:
        print(f"{score_table(record)}\n\n{cost_table(record)}")
    if failed:
        raise RunError(f"no result of {', '.join(failed)}: why stands above. The same command tries again.")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.compare_mechanisms", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="image,text,listops", help=f"of {', '.join(BUDGETS)}; separated by commas")
    parser.add_argument("--mechanisms", default="all", help="names separated by commas, or all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=PATH",
        help="a task's files, as hrrformer train takes them; a task without is generated (listops; image: digits)",
    )
    parser.add_argument("--json", type=Path, help="where the results go (None: scores.json in the folder of the runs)")
    parser.add_argument("--seed", type=int, default=0, help="of the examples, the weights, their order and all noise")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "xla"), help="where to train")
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}-examples", type=int, help=f"{split} examples (None: the budget's)")
    parser.add_argument("--length", type=int, help="tokens of the longest sequence (None: the budget's)")
    args = parser.parse_args(argv)
    args.tasks = names_of(args.tasks, list(BUDGETS), "task")
    args.mechanisms = names_of(args.mechanisms, available_attention(), "mechanism")
    pairs = [pair.partition("=") for pair in args.data]
    if wrong := [f"{task}{equals}{path}" for task, equals, path in pairs if task not in args.tasks or not path]:
        parser.error(f"--data takes TASK=PATH with one of {', '.join(args.tasks)}, not {wrong[0]}")
    args.data = {task: path for task, _, path in pairs}
    sizes = ("length", "train_examples", "validation_examples", "test_examples")
    given = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    if min([args.threads, *given.values()]) < 1:
        parser.error("--threads, --length and numbers of examples must be at least 1")
    args.budgets = {task: replace(BUDGETS[task], **given) for task in args.tasks}
    return args


def names_of(text: str, known: Sequence[str], what: str) -> list[str]:
    """The names in "a,b", each once; "all" stands for those known.

    Raises:
        UserError: a name is not known.
    """
    words = text.split(",")
    if unknown := [name for name in words if name not in (*known, "all")]:
        raise UserError(f"no {what} {unknown[0]!r}; there are {', '.join(known)}.")
    return list(dict.fromkeys(name for word in words for name in (known if word == "all" else [word])))


def prepare(folder: Path, task: str, budget: Budget, data: str, args: argparse.Namespace) -> Path:
    """The packed examples that all runs of a task share, drawn once.

    Raises:
        UserError: the folder holds runs with another budget, data or seed; or as `write_reduced`.
    """
    settings = asdict(budget) | {"data": data, "seed": args.seed, "device": args.device}
    packed, written = folder / "examples.safetensors", folder / "settings.json"
    if packed.exists() and written.exists():
        before = json.loads(written.read_text())
        if before != settings:
            name = next(name for name in settings if before.get(name) != settings[name])
            raise UserError(f"{folder} holds runs with {name} {before.get(name)}, not {settings[name]}: other --out.")
        return packed
    sizes = {split: getattr(budget, f"{split}_examples") for split in ("train", "validation", "test")}
    write_reduced(packed, task, data, budget.length, sizes, args.seed)
    write_json(written, settings)
    return packed


def train_command(
    task: str, mechanism: str, budget: Budget, packed: Path, folder: Path, args: argparse.Namespace
) -> list[str]:
    """`python -m hrrformer train` with the budget."""
    options = list(FLAGS.get(mechanism, []))
    for name, value in OPTIONS.get(mechanism, {}).items():
        options += [f"--attention.{name.replace('_', '-')}", str(value)]
    if get_mechanism(mechanism).masks is not True:
        options += ["--model.use-mask", "false"]
    return [
        *(sys.executable, "-m", "hrrformer", "train", "--task", task, "--data", str(packed), "--out", str(folder)),
        *("--device", args.device, "--seed", str(args.seed), "--model.max-length", str(budget.length)),
        *shlex.split(budget.flags),
        *("--attention", mechanism, *options),
    ]


def run_in_process(command: Sequence[str], folder: Path, threads: int) -> int:
    """Runs a training, passes SIGTERM and Ctrl-C on to it, and notes its CPU seconds: its exit code.

    Raises:
        RunError: it was asked to stop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    stopping = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in stopping}
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    process.returncode = os.waitstatus_to_exitcode(status)
    with (folder / USAGE).open("a") as file:
        file.write(json.dumps({"cpu_sec": usage.ru_utime + usage.ru_stime}) + "\n")
    if process.returncode == 0 and not (folder / RESULT).exists():
        raise RunError("stopped. The same command goes on from here.")
    return process.returncode


def read_run(task: str, mechanism: str, folder: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    result = json.loads((folder / RESULT).read_text())
    ticks = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    usage = folder / USAGE
    used = [json.loads(line)["cpu_sec"] for line in usage.read_text().splitlines()] if usage.exists() else []
    return {
        "task": task,
        "mechanism": mechanism,
        "options": OPTIONS.get(mechanism, {}),
        "flags": FLAGS.get(mechanism, []),
        "masked": get_mechanism(mechanism).masks is True,
        "test_accuracy": result["test_accuracy"],
        "test_loss": result["test_loss"],
        "test_examples": result["test_examples"],
        "majority_baseline": result["test_majority_baseline"],
        "parameters": result["parameters"],
        "steps": result["trained_steps"],
        "examples_per_sec": round(statistics.median(tick["examples_per_sec"] for tick in ticks), 2),
        "cpu_sec": round(sum(used), 1) if used else None,  # of start, training and test; None: it outlived this command
        "peak_memory_gib": round(max(tick["peak_memory_gib"] for tick in ticks), 3),
    }


def mean_scores(record: dict[str, Any]) -> dict[str, float]:
    """{mechanism: mean test accuracy in %} of those that have a result in every task."""
    found: dict[str, list[float]] = {}
    for row in record["results"]:
        found.setdefault(row["mechanism"], []).append(100 * row["test_accuracy"])
    return {
        name: round(statistics.mean(values), 2) for name, values in found.items() if len(values) == len(record["tasks"])
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
