"""Times a training step on the CPU as it is, compiled whole by torch-xla, and by torch-xla the original's way.

    python -m tools.benchmark_training --preset demo --rounds 10

The original's way is what the SMYRF authors' trainer did on a TPU: every gathered tensor and every score of SMYRF in
memory, each optimizer's step a program of its own, and losses read by the host after each of them.

Every round runs every method once, and ratios are medians over rounds of times within a round: on a shared machine
absolute times say little. XLA's device is what PJRT_DEVICE says (CPU where it says nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import torch

import attention.smyrf.functional as smyrf_functional
from attention.smyrf.naive import naive_clustered_attention
from biggan.data import drawn_faces
from biggan.ema import update_ema
from biggan.presets import PRESETS, get_preset
from biggan.run_setup import fit_to_data
from biggan.training import Run
from runtime.device import Device, open_device

IMAGES = 64  # drawn ones; what they show does not matter here


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        steps = {
            "cpu": whole_step(build_run(args, Device(), folder)),
            "xla": whole_step(build_run(args, open_device("xla"), folder)),
            "xla, the original's way": original_step(build_run(args, open_device("xla"), folder)),
        }
        first_sec = {name: timed(step, 0) for name, step in steps.items()}
        for step in steps.values():
            timed(step, 1)  # a second program may still be compiled
        rounds = [{name: timed(step, i) for name, step in steps.items()} for i in range(2, args.rounds + 2)]
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, PJRT_DEVICE={os.environ['PJRT_DEVICE']}",
        "torch": torch.__version__,
        "threads": args.threads,
        "preset": args.preset,
        "global_batch_size": args.batch_size,
        "rounds": args.rounds,
        "methods": {name: summary(name, first_sec[name], rounds) for name in steps},
    }
    print(f"{'method':<26}{'first step':>12}{'median step':>13}{'to cpu':>8}")
    for name, values in record["methods"].items():
        print(f"{name:<26}{values['first_sec']:>10.1f} s{values['median_sec']:>11.3f} s{values['ratio_to_cpu']:>8.2f}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.benchmark_training", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo", choices=tuple(PRESETS), help="network and recipe")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step")
    parser.add_argument("--rounds", type=int, default=10, help="steps measured for each method")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads on the cpu")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    return parser.parse_args(argv)


def build_run(args: argparse.Namespace, device: Device, folder: str) -> Run:
    config = replace(get_preset(args.preset), global_batch_size=args.batch_size, drawn_faces=IMAGES)
    dataset = drawn_faces(config.model.resolution, IMAGES)
    return Run(fit_to_data(config, dataset, device.num_shards), dataset, device, Path(folder))


def whole_step(run: Run) -> Callable[[int], None]:
    """The trainer's own step, without a look at its numbers."""
    step = run.device.compile_step(run.train_step)

    def advance(i: int) -> None:
        step(*run.batch(i))
        run.device.synchronize()

    return advance


def original_step(run: Run) -> Callable[[int], None]:
    """A program for each optimizer's step, whose values the host reads."""
    gan, parts = run.gan, run.config.accumulation_steps

    def read(values: dict[str, torch.Tensor]) -> None:
        run.device.synchronize()
        for value in values.values():
            float(value)

    def advance(i: int) -> None:
        *dealt, rate = run.batch(i)[:5]
        images, labels, z, y = (x.unflatten(0, (-1, parts)) for x in dealt)
        with naive_smyrf():
            for j in range(run.config.d_steps_per_g_step):
                read(gan.discriminator_step(images[j], labels[j], z[j], y[j]))
            read(gan.generator_step(z[-1], y[-1]))
        update_ema(gan.ema_generator, gan.generator, rate.squeeze())
        run.device.synchronize()

    return advance


@contextmanager
def naive_smyrf() -> Iterator[None]:
    """SMYRF's einsum back-end replaced by its naive twin."""
    original = smyrf_functional.einsum_attend

    def naive(q, k, v, layout, scale, dropout):
        orders, sizes = zip(*((x.flatten(3), x.shape[4]) for x in (layout.q_index, layout.k_index)), strict=True)
        return naive_clustered_attention(q, k, v, *orders, *sizes, scale, layout.key_mask), q.new_zeros(q.shape[:3])

    smyrf_functional.einsum_attend = naive
    try:
        yield
    finally:
        smyrf_functional.einsum_attend = original


def timed(step: Callable[[int], None], i: int) -> float:
    start = time.perf_counter()
    step(i)
    return time.perf_counter() - start


def summary(name: str, first_sec: float, rounds: list[dict[str, float]]) -> dict[str, float]:
    return {
        "first_sec": first_sec,  # with all compilation
        "median_sec": statistics.median(times[name] for times in rounds),
        "ratio_to_cpu": statistics.median(times[name] / times["cpu"] for times in rounds),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
