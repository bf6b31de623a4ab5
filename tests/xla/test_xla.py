"""torch-xla on its CPU device: one program a step, the CPU's numbers, and one device's numbers on four.

The programs run in processes of their own (see gan_program.py), for PJRT fixes the number of devices once for each.
What they are held to on a TPU is the same, except time.

Numbers are compared in float64, with the preset's own optimizer: there two ways to compute the same thing agree in
every parameter. In float32 they cannot: Adam makes steps of up to the learning rate out of gradients that are rounding
noise (those of a bias before a batch norm are nothing else), on one CPU too. So of float32 it is asked that all agree
with an epsilon above that noise, and that with the preset's own it be as near to the numbers in float64 on xla as on
the CPU.
"""

import importlib.util
import math
import re

import gan_program
import pytest
import torch
from on_xla import ABOVE_NOISE, NETWORKS, assert_one_program, distance, run_program

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla"),
]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    out = tmp_path_factory.mktemp("cpu") / "out.pt"
    runs = {"float32": {"samples": 12}, "calm": {"epsilon": ABOVE_NOISE}, "float64": {"float64": True}}
    gan_program.main(out, "cpu", runs, features_of=3, layers=True)
    return torch.load(out)


@pytest.fixture(scope="module")
def on_xla(tmp_path_factory):
    runs = {
        "float32": {"steps": 20, "samples": 12},
        "calm": {"epsilon": ABOVE_NOISE},
        "float64": {"float64": True},
        "bfloat16": {"precision": "bfloat16", "steps": 5},
    }
    return run_program(tmp_path_factory.mktemp("xla") / "out.pt", {"runs": runs})


@pytest.fixture(scope="module")
def on_four_devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spmd")
    runs = {
        "float64": {"float64": True, "samples": 12},
        "sharded": {"float64": True, "shard_parameters": True, "checkpoint_activations": "blocks", "steps": 5},
        "calm": {"epsilon": ABOVE_NOISE},
        "sharded program": {"steps": 1, "record": 1, "shard_parameters": True},
    }
    dump = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=step.*"
    options = {"runs": runs, "features_of": 3, "layers": True}
    return run_program(folder / "out.pt", options, num_devices=4, flags=dump) | {"folder": folder / "dump"}


def assert_same_numbers(found, expected, tolerance=1e-8):
    """Of every parameter and statistic, relative to the largest of its tensor, and of every value for the log."""
    for network in NETWORKS:
        for name, tensor in expected["state"][network].items():
            error = (found["state"][network][name] - tensor).abs().max() / tensor.abs().max()
            assert error <= tolerance, (network, name, error)
    assert found["values"] == pytest.approx(expected["values"], rel=tolerance)


def assert_same_clusters(found, expected, share=1.0, num_clusters=2):
    """At least this share of the tokens of every attention is in the same cluster."""
    for orders in zip(found["clusters"], expected["clusters"], strict=True):
        first, second = (order.argsort(dim=-1) * num_clusters // order.shape[-1] for order in orders)
        assert (first == second).float().mean() >= share


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
def test_one_program_a_step(on_xla, name):
    assert_one_program(on_xla[name]["counters"])


@pytest.mark.parametrize("name", ["float64", "sharded", "calm"])
def test_one_program_a_step_on_four_devices(on_four_devices, name):
    assert_one_program(on_four_devices[name]["counters"])


def test_sampling_is_one_program_a_batch(on_xla, on_four_devices):
    for counters in (on_xla["float32"]["counters_of_images"], on_four_devices["float64"]["counters_of_images"]):
        before, after = counters
        assert after["executions"] - before["executions"] == 2  # 12 images by 8
        assert after["compilations"] - before["compilations"] == 1
        assert not [name for name in after if name.startswith("aten::")]


def test_three_steps_give_the_numbers_of_the_cpu(on_xla, on_cpu):
    assert_same_numbers(on_xla["float64"], on_cpu["float64"])
    assert_same_clusters(on_xla["float64"], on_cpu["float64"])


def test_float32_gives_the_same_numbers_above_the_noise(on_xla, on_four_devices, on_cpu):
    for found, expected in ((on_xla, on_cpu), (on_four_devices, on_xla)):
        assert_same_numbers(found["calm"], expected["calm"], tolerance=1e-4)
        assert_same_clusters(found["calm"], expected["calm"], share=0.99)


def test_float32_is_as_near_to_the_truth_as_on_the_cpu(on_xla, on_cpu):
    truth, found, expected = on_cpu["float64"], on_xla["float32"], on_cpu["float32"]
    ours, theirs = (distance(run["state"], truth["state"]) for run in (found, expected))
    assert ours <= 2 * theirs + 1e-6
    assert found["values"] == pytest.approx(expected["values"], rel=1e-3)
    assert_same_clusters(found, expected, share=0.99)  # a token at a border may cross it


def test_four_devices_give_the_numbers_of_one(on_four_devices, on_xla):
    assert_same_numbers(on_four_devices["float64"], on_xla["float64"])
    assert_same_clusters(on_four_devices["float64"], on_xla["float64"])


def test_sharded_parameters_and_checkpointed_activations_change_nothing(on_four_devices, on_xla):
    assert_same_numbers(on_four_devices["sharded"], on_xla["float64"])


def collectives(program):
    """(operation, shape) of everything that the devices exchange."""
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* ({kinds})(?:-start)?\(", program)
    return {(kind, tuple(map(int, shape.split(","))) if shape else ()) for shape, kind in found}


def step_programs(folder):
    """The partitioned programs of the steps in float32, by whether parameters enter them in parts.

    (In float64 the partitioner knows no gradient of max pooling.)
    """
    kernel = re.compile(r"f32\[\d+,\d+,3,3\]\S* parameter\(\d+\), sharding=\{(replicated|devices)")
    programs = {"replicated": [], "devices": []}
    for path in folder.glob("*.step.*after_optimizations.txt"):
        program = path.read_text()
        if "all-reduce" in program and (match := kernel.search(program)):
            programs[match[1]].append(program)
    (whole,), (in_parts,) = programs.values()
    return {False: whole, True: in_parts}


def test_devices_exchange_nothing_but_sums_of_statistics_and_gradients(on_four_devices):
    """No activation is gathered, and none is summed: what is exchanged has the shape of a parameter or statistic."""
    program = step_programs(on_four_devices["folder"])[False]
    assert "sharding={devices=[1,4" in program  # the batch is dealt
    assert {kind for kind, _ in collectives(program)} == {"all-reduce"}
    assert_shapes_of_parameters(on_four_devices, {shape for _, shape in collectives(program)})


def test_of_sharded_parameters_devices_exchange_weights_and_gradients(on_four_devices):
    """Weights are gathered, activations are not."""
    program = step_programs(on_four_devices["folder"])[True]
    assert {kind for kind, _ in collectives(program)} <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert "all-gather" in {kind for kind, _ in collectives(program)}
    assert_shapes_of_parameters(on_four_devices, {shape for _, shape in collectives(program)})


def assert_shapes_of_parameters(found, shapes):
    """XLA may transpose a gradient before it sums it, and drop dimensions of size 1."""

    def core(shape):
        return tuple(sorted(n for n in shape if n > 1))

    known = {core(x.shape) for network in NETWORKS for x in found["float64"]["state"][network].values()} | {()}
    assert not [shape for shape in shapes if core(shape) not in known]


def test_features_of_the_fid_network(on_four_devices, on_cpu):
    """Six images at a time, dealt to four devices as eight."""
    found, expected = on_four_devices["features"], on_cpu["features"]["features"]
    torch.testing.assert_close(found["features"], expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    compiled = [after["compilations"] - before["compilations"] for before, after in found["counters"]]
    executed = [after["executions"] - before["executions"] for before, after in found["counters"]]
    assert compiled == [0, 0, 0] and executed == [1, 1, 1]  # the statistics of the data have compiled it
    assert not [name for name in found["counters"][-1][1] if name.startswith("aten::")]


@pytest.mark.parametrize("name", ["hrr", "smyrf"])
def test_self_attention_layers(on_four_devices, on_cpu, name):
    assert on_four_devices["attention"]["fallbacks"] == []
    for found, expected in zip(on_four_devices["attention"][name], on_cpu["attention"][name], strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_bfloat16_keeps_float32_weights(on_xla):
    found = on_xla["bfloat16"]
    assert {tensor.dtype for network in NETWORKS for tensor in found["state"][network].values()} == {torch.float32}
    assert all(math.isfinite(value) for value in found["values"].values())
    assert found["values"] != pytest.approx(on_xla["float32"]["values"], rel=1e-3)  # else it computed in float32
