"""What tests of torch-xla share: programs that run on its CPU device, in processes of their own."""

import json
import math

import torch
from launch import ROOT, run

ABOVE_NOISE = 1e-2  # an epsilon of Adam
NETWORKS = ("generator", "discriminator", "ema_generator")
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # in half the time


def run_on_xla(command, num_devices=1, flags=""):
    return run(command, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=num_devices, XLA_FLAGS=f"{QUICK_TO_COMPILE} {flags}")


def run_program(out, options, **where):
    run_on_xla([ROOT / "tests" / "gan_program.py", out, json.dumps({"device": "xla"} | options)], **where)
    return torch.load(out)


def assert_one_program(counters):
    """`counters` before and after each step: only the first compiles, each runs one program, and nothing falls back.

    A checkpoint was loaded after the third, and from the second on the averaged generator is no copy any more: neither
    costs a compilation.
    """
    compiled = [after["compilations"] - before["compilations"] for before, after in counters]
    assert compiled == [1] + [0] * (len(counters) - 1)
    assert {after["executions"] - before["executions"] for before, after in counters} == {1}
    assert not [name for name in counters[-1][1] if name.startswith("aten::")]


def distance(found, truth):
    """Of all parameters and statistics of two states, as one vector, relative to the second."""
    pairs = [(found[n][name].double(), x) for n in NETWORKS for name, x in truth[n].items()]
    return math.sqrt(sum((x - y).square().sum() for x, y in pairs) / sum(y.square().sum() for _, y in pairs))
