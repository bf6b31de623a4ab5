"""A worker of `tools.benchmark_versions`: a training run of `biggan` in a process of its own, advanced on demand.

    PYTHONPATH=CHECKOUT python tools/gan_steps.py NAME CHECKOUT THREADS PRESET BATCH

It uses the packages of the checkout, of any version that trains. Each line "time" on its stdin is answered with the
milliseconds of one step, "values" with the losses, logits and gradient norms of the steps before.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.cli import run_command  # isort: skip: before torch, for it makes idle threads sleep

import torch

import biggan
from biggan.data import drawn_faces
from biggan.presets import get_preset
from biggan.run_setup import fit_to_data
from biggan.training import Run
from runtime.device import Device
from runtime.errors import RunError

IMAGES = 64  # drawn ones; what they show does not matter here


def build_run(preset: str, batch: int, folder: str) -> Run:
    config = replace(get_preset(preset), global_batch_size=batch, drawn_faces=IMAGES)
    device, dataset = Device(), drawn_faces(config.model.resolution, IMAGES)
    return Run(fit_to_data(config, dataset, device.num_shards), dataset, device, Path(folder))


def main(argv: Sequence[str]) -> None:
    _, checkout, threads, preset, batch = argv
    loaded = Path(biggan.__file__).parents[1]
    if loaded != Path(checkout):
        raise RunError(f"biggan came from {loaded}, not from {checkout}")
    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(preset, int(batch), folder)
        advance, step = run.device.compile_step(run.train_step), 0
        for line in sys.stdin:
            if line.strip() == "values":
                answer = run.means.take()()
            else:
                wall, cpu = time.perf_counter(), time.process_time()
                advance(*run.batch(step))
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                answer = {"wall": 1e3 * wall, "cpu": 1e3 * cpu}
                step += 1
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
