"""What the tests of the Hrrformer on torch-xla run in a process of their own, as program.py does for the GAN.

    python tests/xla/program_hrrformer.py OUT '{"device": "xla", "steps": 12}'

trains a tiny image model on data that it packs beside OUT, so many steps in each phase, and writes the state that the
last step left, the mean values of each phase, two validations, torch-xla's counters after each step and each
validation, and what `noise` returns.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_hrrformer import pack_image, tiny_image_config

from hrrformer.dropout import dropout
from hrrformer.learner import compile_by_shape
from hrrformer.run_setup import fit_to_data, open_data
from hrrformer.training import Run
from runtime.device import open_device
from runtime.randomness import derive_seed


def main(out, device="xla", steps=12, epsilon=1e-2, lr=5e-2, **changes):
    """`epsilon` is Adam's. Its usual 1e-8 makes the sign of every gradient, however small, a whole step: rounding
    noise then grows to 1e-2 in a few steps between any two orders of summation, on one CPU too."""
    device, folder = open_device(device), Path(out).parent
    config = tiny_image_config(pack_image(folder), folder)
    model = replace(config.model, dropout=0.0)  # each device draws its own noise
    config = replace(config, model=model, optimizer=replace(config.optimizer, epsilon=epsilon, lr=lr), **changes)
    data = open_data(config)
    run = Run(fit_to_data(config, data, device.num_shards), data, device, folder)
    counters, values = {}, {}
    for phase in run.phases:
        run.enter(phase)
        step, counters[phase.name] = compile_by_shape(device, run.train_step), []
        for i, batch in zip(range(steps), phase.batches(phase.first, device), strict=False):
            device.seed(derive_seed("step", i))
            step(*run.put(*batch))
            device.synchronize()
            counters[phase.name].append(device.counters())
        values[phase.name] = run.means.take()()
    found = {"state": device.to_host(run.state_dict()), "values": values, "counters": counters}
    found["evaluations"], found["counters_of_evaluations"] = [], [device.counters()]
    for _ in range(2):
        evaluation = run.evaluator(data.validation)
        found["evaluations"].append({"confusion": evaluation.confusion, "loss": evaluation.loss})
        device.synchronize()  # executions are counted late
        found["counters_of_evaluations"].append(device.counters())
    found["noise"] = noise(device)
    torch.save(found, out)
    return found


def noise(device):
    """Dropout of a dealt batch (8, 64) of ones, with the seeds 0, 1 and 0, and the counters after each."""
    step = device.compile_step(lambda x: device.all_rows(dropout(x, 0.5, training=True)))
    found = []
    for seed in (0, 1, 0):
        device.seed(seed)
        out = step(device.put(torch.ones(8, 64), batch_dim=0)).cpu()
        device.synchronize()
        found.append((out, device.counters()))
    return found


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
