"""What tests of torch-xla and of torchrun run in processes of their own, where devices and processes are set up anew.

    python tests/gan_program.py OUT '{"device": "xla", "runs": {"quick": {}, "exact": {"float64": true, "steps": 20}}}'

trains a narrow network for each of `runs` (the options of `train`, and `float64`) and writes to OUT, by the name of the
run, what `train` returns. With `"features_of": N`, also the features that a randomly initialised FID network has of N
batches; with `"layers": true`, what `attention` returns; with `"evaluate": true`, what `evaluation` returns; with
`"fallbacks_of": [PRESET, ...]`, what `fallbacks` returns, with `"changes"` of their configurations.
"""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

import attention.smyrf.functional as smyrf_functional
from attention import HRRSelfAttention, MultiHeadAttention
from biggan.config import AttentionConfig, TrainConfig
from biggan.data import drawn_faces
from biggan.metrics.evaluator import evaluate as evaluate_images
from biggan.metrics.features import FeatureExtractor
from biggan.metrics.inception import FIDInception
from biggan.presets import get_preset, smyrf
from biggan.run_setup import fit_to_data
from biggan.training import Run
from runtime.checkpoint import checksum
from runtime.config import from_dict, to_dict
from runtime.device import open_device
from runtime.randomness import derive_seed


def demo():
    """With two clusters: the fewer borders, the fewer tokens that rounding carries over one. The averaged generator
    starts as a copy, as that of the large presets."""
    base = get_preset("demo")
    model = replace(base.model, generator_channels=4, discriminator_channels=4, dim_z=8)
    attention, ema = smyrf(2, 128, 32, (16,), (16,)), replace(base.ema, start_step=2)
    return replace(base, global_batch_size=8, drawn_faces=24, model=model, attention=attention, ema=ema)


def narrow(name, shrink=1):
    """A preset's recipe with eight channels and four images a step; at 1 / `shrink` of its resolutions, with as many
    clusters."""
    base = get_preset(name)
    maps = [
        tuple(size // shrink for size in sizes)
        for sizes in (base.attention.generator_resolutions, base.attention.discriminator_resolutions)
    ]
    options = {key: n // shrink**2 if "cluster" in key else n for key, n in base.attention.options.items()}
    model = replace(
        base.model,
        resolution=base.model.resolution // shrink,
        generator_channels=8,
        discriminator_channels=8,
        dim_z=24,
        num_classes=base.model.num_classes or 3,
    )
    return replace(
        base,
        data="drawn-faces",
        drawn_faces=24,
        global_batch_size=4,
        model=model,
        attention=AttentionConfig(base.attention.name, *maps, options),
    )


def changed(config, changes):
    """The configuration with other values, of which those of a section are plain dicts and lists too."""
    return from_dict(TrainConfig, to_dict(config) | changes)


def train(device, folder, narrowed="", steps=3, record=3, samples=0, epsilon=None, **changes):
    """Trains `demo`, or half the resolution of the preset `narrowed`, and goes through a checkpoint after step
    `record`; `epsilon` is Adam's.

    Returns:
        `state`, `values` and `clusters`: all weights, statistics and moments after that step, the mean values until
        then and the hash clusters in its last network calls; `images` drawn at the end, as many as `samples`;
        `counters` of torch-xla before and after each step, and `counters_of_images`.
    """
    config = changed(narrow(narrowed, shrink=2) if narrowed else demo(), changes)
    if epsilon:
        config = replace(config, optimizer=replace(config.optimizer, epsilon=epsilon))
    run = build(config, device, folder)
    counters, found = [], {}
    step = device.compile_step(run.train_step)
    for i in range(steps):
        device.seed(derive_seed("step", i))
        batch, before = run.batch(i), counters_of(device)
        with remembered_clusters() as clusters:
            step(*batch)
        counters.append((before, counters_of(device)))
        if i + 1 == record:
            found = {"state": device.to_host(run.gan.state_dict()), "values": run.means.take()()}
            found["clusters"] = [order.cpu() for order in clusters]
            run.gan.load_state_dict(found["state"])
            step = device.compile_step(run.train_step)
    before = counters_of(device)
    found["images"] = torch.cat(list(run.measurements.samples(samples, 0))) if samples else None
    return found | {"counters": counters, "counters_of_images": (before, counters_of(device))}


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


@contextlib.contextmanager
def computing_in_float64(device):
    """From the same weights and noise as in float32, of which everything is then a copy in float64.

    Rounding at 1e-16 stays invisible where at 1e-7 it does not: of a gradient that is 0 but for rounding, Adam makes a
    step of any size up to the learning rate.
    """
    put, put_network, to_float = device.put, device.put_network, torch.Tensor.float

    def put_double(x, *args, **options):
        return put(x.double() if x.is_floating_point() else x, *args, **options)

    device.put, torch.Tensor.float = put_double, torch.Tensor.double
    device.put_network = lambda network, *args: put_network(network.double(), *args)
    yield
    device.put, device.put_network, torch.Tensor.float = put, put_network, to_float


def counters_of(device):
    """When all that was asked of the device is done, and counted."""
    device.synchronize()
    return device.counters()


@contextlib.contextmanager
def remembered_clusters():
    """A list that the two orders of each SMYRF attention are added to, call by call."""
    found, original = [], smyrf_functional.cluster_orders

    def remember(*args):
        orders = original(*args)
        found.extend(order.detach() for order in orders)
        return orders

    smyrf_functional.cluster_orders = remember
    yield found
    smyrf_functional.cluster_orders = original


def fallbacks(device, folder, names, changes):
    """By preset, with `changes`, the operations of its step that torch-xla leaves to the host.

    The step is traced and written as a program, narrow but at its own resolution, and neither compiled nor run.
    """
    runs = {name: build(changed(narrow(name), changes), device, folder) for name in names}
    batches = {name: run.batch(0) for name, run in runs.items()}
    before, found = counters_of(device), {}
    for name, run in runs.items():
        run.train_step(*batches[name])
        written = [x for x in tree_leaves(run.gan.state_dict()) if isinstance(x, torch.Tensor)]
        assert torch_xla_program(written).startswith("HloModule")
        after = device.counters()
        found[name] = [key for key, n in after.items() if key.startswith("aten::") and n != before.get(key, 0)]
        before = after
    return found


def torch_xla_program(tensors):
    import torch_xla

    return torch_xla._XLAC._get_xla_tensors_hlo(tensors)


def features(device, count):
    """Features of `count` batches as the FID takes them, of 6 images but the last, of 3; the counters around each."""
    torch.manual_seed(0)
    images = torch.randint(256, (count, 6, 3, 32, 32), dtype=torch.uint8)
    counters, found = [], []
    extractor = FeatureExtractor(FIDInception(), "pytorch-fid", device)
    extractor.extract(images[0])
    for batch in [*images[:-1], images[-1, :3]]:
        before = counters_of(device)
        found.append(extractor.extract(batch)[0].cpu())
        counters.append((before, counters_of(device)))
    return {"features": torch.cat(found), "counters": counters}


def attention(device):
    """By the mechanism, the output of a self-attention layer for a batch with padding, and all gradients."""
    found = {}
    for name, options in (("hrr", {}), ("smyrf", {"num_hashes": 2, "q_cluster_size": 16, "k_cluster_size": 16})):
        torch.manual_seed(0)
        layer = HRRSelfAttention(16, 2) if name == "hrr" else MultiHeadAttention(16, 2, name, **options)
        device.put_network(layer, torch.contiguous_format)
        if name == "smyrf":
            layer.attention.projections = device.put(torch.randn(layer.attention.projection_shape(64, 64, 8)))
        x, mask = torch.randn(8, 64, 16), torch.arange(64) >= torch.linspace(32, 64, 8)[:, None]

        def step(x, mask, layer=layer):
            out = layer(x, mask)
            return out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])

        arguments = device.put(x, batch_dim=0).requires_grad_(), device.put(mask, batch_dim=0)
        found[name] = [y.detach().cpu() for y in device.compile_step(step)(*arguments)]
    return found | {"fallbacks": [name for name in device.counters() if name.startswith("aten::")]}


class Colours(torch.nn.Module):
    """A feature network of six features, in place of the FID's."""

    name, weights_hash, feature_dim = "colours", "none", 6

    def forward(self, images, resize_rule):
        images = images.float()
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def evaluation(device, folder):
    """FID, KID and SWD of images that no number of processes divides, twice: with statistics computed and cached."""
    generator = torch.Generator().manual_seed(0)
    fake = torch.randint(256, (23, 3, 32, 32), generator=generator, dtype=torch.uint8)
    dataset = drawn_faces(32, 37)
    dataset.fingerprint = "37 faces"
    options = {"network": Colours(), "cache_dir": folder, "device": device, "progress": False}
    return [dict(evaluate_images(fake.split(9), 23, dataset, ["fid", "kid", "swd"], **options)) for _ in range(2)]


def main(out, device, runs=None, features_of=0, layers=False, evaluate=False, fallbacks_of=(), changes=None):
    device, found = open_device(device), {}
    for name, options in (runs or {}).items():
        in_float64 = options.pop("float64", False)
        with computing_in_float64(device) if in_float64 else contextlib.nullcontext():
            found[name] = train(device, Path(out).parent, **options)
        mine = checksum(found[name]["state"])
        assert device.processes.from_main(lambda mine=mine: mine) == mine, "processes have drifted apart"
    if features_of:
        found["features"] = features(device, features_of)
    if layers:
        found["attention"] = attention(device)
    if evaluate:
        found["evaluation"] = evaluation(device, Path(out).parent)
    if fallbacks_of:
        found["fallbacks"] = fallbacks(device, Path(out).parent, fallbacks_of, changes or {})
    if device.processes.is_main:
        torch.save(found, out)


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
