"""What the tests of torch-xla run in a process of their own: PJRT fixes the number of devices once for each process.

    python tests/xla/program.py train OUT '{"device": "xla", "steps": 20}'

trains a narrow network and writes to OUT what the third step left (the state, the mean values until then, the hash
clusters in its last network calls), images drawn at the end, and torch-xla's counters after each step and at the end.

    python tests/xla/program.py features OUT '{"device": "xla"}'

writes the features that a randomly initialised FID network has of three batches, and the counters after each.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import attention.smyrf.functional as smyrf_functional
from biggan.data import drawn_faces
from biggan.metrics.inception import FIDInception
from biggan.presets import get_preset, smyrf
from biggan.run_setup import fit_to_data
from biggan.training import Run
from runtime.device import open_device
from runtime.randomness import derive_seed


def demo():
    """With two clusters: the fewer borders, the fewer tokens that rounding carries over one."""
    base = get_preset("demo")
    model = replace(base.model, generator_channels=4, discriminator_channels=4, dim_z=8)
    attention = smyrf(2, 128, 32, (16,), (16,))
    return replace(base, global_batch_size=8, drawn_faces=24, model=model, attention=attention)


def celebahq128():
    """The recipe of celebahq128-smyrf: two discriminator steps, attention at full resolution; at 64x64 and narrow."""
    base = get_preset("celebahq128-smyrf")
    model = replace(base.model, resolution=64, generator_channels=8, discriminator_channels=8, dim_z=8)
    attention = smyrf(4, 512, 128, (64,), (32,))
    return replace(base, data="drawn-faces", global_batch_size=4, drawn_faces=24, model=model, attention=attention)


def build(config, device, folder):
    dataset = drawn_faces(config.model.resolution, config.drawn_faces)
    run = Run(fit_to_data(config, dataset, device.num_shards), dataset, device, folder)
    state = run.gan.state_dict()
    for network in ("generator", "discriminator", "ema_generator"):
        for name in state[network]:
            if name.endswith("gamma"):  # starts at 0, which would hide the attention
                state[network][name] = torch.tensor(0.5)
    run.gan.load_state_dict(state)
    return run


def train(out, preset="demo", device="xla", steps=3, epsilon=1e-2, samples=0, **changes):
    """`epsilon` is Adam's. Its usual 1e-6 makes the sign of every gradient, however small, a whole step: rounding
    noise then grows to 1e-2 in three steps between any two orders of summation, on one CPU too."""
    device = open_device(device)
    config = replace({"demo": demo, "celebahq128": celebahq128}[preset](), **changes)
    run = build(replace(config, optimizer=replace(config.optimizer, epsilon=epsilon)), device, Path(out).parent)
    clusters, counters, found = [], [], {}
    remember_clusters(clusters)
    step = device.compile_step(run.train_step)
    for i in range(steps):
        clusters.clear()
        device.seed(derive_seed("step", i))
        step(*run.batch(i))
        device.synchronize()
        counters.append(device.counters())
        if i == 2:
            state = torch.utils._pytree.tree_map(lambda x: x.cpu(), run.gan.state_dict())
            found = {"state": state, "values": run.means.take()(), "clusters": [order.cpu() for order in clusters]}
    found["images"] = torch.cat(list(run.samples(samples, 0))) if samples else None
    counters.append(device.counters())
    torch.save(found | {"counters": counters}, out)


def remember_clusters(found):
    original = smyrf_functional.cluster_orders

    def remember(*args):
        orders = original(*args)
        found.extend(order.detach() for order in orders)
        return orders

    smyrf_functional.cluster_orders = remember


def features(out, device="xla"):
    device = open_device(device)
    torch.manual_seed(0)
    network, counters, found = FIDInception().to(device.torch_device), [], []
    for images in torch.randint(256, (3, 2, 3, 32, 32), dtype=torch.uint8):
        found.append(network(device.put(images)).cpu())
        device.synchronize()
        counters.append(device.counters())
    torch.save({"features": torch.cat(found), "counters": counters}, out)


if __name__ == "__main__":
    {"train": train, "features": features}[sys.argv[1]](sys.argv[2], **json.loads(sys.argv[3]))
