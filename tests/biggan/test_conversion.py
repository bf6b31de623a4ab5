"""Checkpoints in the original's format, written from networks of ours, come back as those networks."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from biggan.__main__ import dispatch
from biggan.checkpoints import read
from biggan.conversion import convert_original
from biggan.discriminator import Discriminator
from biggan.generator import Generator
from biggan.training import train
from runtime.cli import run_command
from runtime.errors import UserError
from tools import convert_biggan

UNCONDITIONAL = {"dim_z": 20, "num_classes": 1, "shared_dim": 0, "hierarchical": False}
CONDITIONAL = {"dim_z": 40, "num_classes": 3, "shared_dim": 8, "hierarchical": True}
BUFFERS = ("u0", "sv0", "stored_mean", "stored_var")


def to_original(state):
    """Our names to the original's; in another order than ours, as the original's is."""
    names = {}
    for key in reversed(state):
        name = re.sub(r"^blocks\.(\d+)\.residual", r"blocks.\1.0", key)
        name = re.sub(r"^blocks\.(\d+)\.attention", r"blocks.\1.1", name).replace("shortcut", "conv_sc")
        names[key] = name.replace("output.bn", "output_layer.0").replace("output.conv", "output_layer.2")
    return {name: state[key].clone() for key, name in names.items()}


def adam_state(state, lr):
    """What `Adam.state_dict()` held in torch 1.6, with moments that can be told apart."""
    parameters = [tensor for name, tensor in state.items() if not name.endswith(BUFFERS)]
    moments = {i: {"step": 7, "exp_avg": p * 2, "exp_avg_sq": p * p} for i, p in enumerate(parameters)}
    group = {"lr": lr, "betas": (0.0, 0.999), "eps": 1e-6, "weight_decay": 0, "amsgrad": False}
    return {"state": moments, "param_groups": [group | {"params": list(range(len(parameters)))}]}


def write(folder, generator, discriminator, tail="", **options):
    """A folder as BigGAN-PyTorch writes it."""
    g, d = to_original(generator.state_dict()), to_original(discriminator.state_dict())
    progress = {
        "itr": 120,
        "best_FID": np.float64(12.5),
        "config": {"G_activation": nn.ReLU(inplace=True), "n_hashes": 4, "q_cluster_size": 64, "k_cluster_size": 16},
    }
    files = {"G": g, "G_ema": g, "D": d, "G_optim": adam_state(g, 5e-5), "D_optim": adam_state(d, 2e-4)}
    for name, content in (files | {"state_dict": progress}).items():
        torch.save(content, folder / f"{name}{tail}.pth", **options)


def networks(resolution=32, generator_resolutions=(16, 32), discriminator_resolutions=(16,), **options):
    torch.manual_seed(0)
    options = CONDITIONAL | options
    common = {"resolution": resolution, "attention": "dense"}
    generator = Generator(**common, channels=8, attention_resolutions=generator_resolutions, **options)
    discriminator = Discriminator(
        **common, channels=16, num_classes=options["num_classes"], attention_resolutions=discriminator_resolutions
    )
    return generator, discriminator


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, *networks())
    return tmp_path


@pytest.mark.parametrize("options", [UNCONDITIONAL, CONDITIONAL, CONDITIONAL | {"hierarchical": False}])
@pytest.mark.parametrize(("resolution", "places"), [(32, ((32,), (16, 8))), (64, ((), (32, 4)))])
def test_conversion_restores_networks_and_architecture(tmp_path, options, resolution, places):
    generator, discriminator = networks(resolution, *places, **options)
    write(tmp_path, generator, discriminator)
    converted = convert_original(tmp_path)
    for name, network in (("generator", generator), ("ema_generator", generator), ("discriminator", discriminator)):
        assert converted[name].keys() == network.state_dict().keys()
        assert all(torch.equal(converted[name][key], tensor) for key, tensor in network.state_dict().items())
    dims = {"resolution": resolution, "generator_channels": 8, "discriminator_channels": 16}
    assert converted["model"] == dims | options
    assert converted["attention"] == {
        "name": "smyrf",
        "generator_resolutions": places[0],
        "discriminator_resolutions": tuple(sorted(places[1])),
        "options": {"num_hashes": 4, "q_cluster_size": 64, "k_cluster_size": 16},
    }
    assert converted["step"] == 120 and converted["missing"] == []


def test_optimizers_follow_their_parameters(folder):
    converted = convert_original(folder)
    for name, network in zip(("generator", "discriminator"), networks(), strict=True):
        state = converted[f"{name}_optimizer"]
        assert state.keys() == dict(network.named_parameters()).keys()
        for key, parameter in network.named_parameters():
            assert torch.equal(state[key]["exp_avg"], parameter.detach() * 2)
            assert torch.equal(state[key]["exp_avg_sq"], parameter.detach().square())
            assert state[key]["step"] == 7 and state[key]["step"].dtype == torch.float32
    rates = {"generator_lr": 5e-5, "discriminator_lr": 2e-4}
    assert converted["optimizer"] == rates | {"beta1": 0.0, "beta2": 0.999, "epsilon": 1e-6}


def test_files_of_old_versions_of_torch(tmp_path):
    generator, discriminator = networks()
    write(tmp_path, generator, discriminator, _use_new_zipfile_serialization=False)
    converted = convert_original(tmp_path)
    assert torch.equal(converted["generator"]["linear.bias"], generator.linear.bias)
    assert converted["step"] == 120 and converted["attention"]["name"] == "smyrf"


def test_statistics_of_batch_norms_trained_across_devices(tmp_path):
    generator, discriminator = networks()
    write(tmp_path, generator, discriminator)
    state = torch.load(tmp_path / "G.pth", weights_only=True)
    for name in [name for name in state if ".stored_" in name]:
        state[name.replace(".stored_", ".bn.running_")] = state.pop(name) + 3
        state[name.rsplit(".", 1)[0] + ".bn.num_batches_tracked"] = torch.tensor(5)
    torch.save(state, tmp_path / "G.pth")
    converted = convert_original(tmp_path)["generator"]
    assert converted.keys() == generator.state_dict().keys()
    assert torch.equal(converted["output.bn.stored_mean"], generator.output.bn.stored_mean + 3)


def test_missing_files_are_named(folder):
    for name in ("G", "D", "D_optim", "state_dict"):
        (folder / f"{name}.pth").unlink()
    converted = convert_original(folder)
    assert converted["missing"] == ["G.pth", "D.pth", "D_optim.pth", "state_dict.pth"]
    absent = {"generator", "discriminator", "generator_optimizer", "discriminator_optimizer"}
    assert not absent & converted.keys() and "ema_generator" in converted
    assert converted["attention"]["name"] == "dense" and converted["step"] == 0


def test_suffix_chooses_a_copy(tmp_path):
    write(tmp_path, *networks(), tail="_copy0")
    assert convert_original(tmp_path, suffix="copy0")["missing"] == []
    with pytest.raises(UserError, match="neither G.pth nor G_ema.pth.*--suffix: copy0"):
        convert_original(tmp_path)


class Code:
    def __reduce__(self):
        return os.mkdir, ("this-must-not-appear",)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("content", [{"a": Code()}, {"itr": 1, "config": {"a": nn.ReLU(), "b": Code()}}])
@pytest.mark.parametrize("name", ["G", "G_optim", "state_dict"])
def test_code_in_a_file_is_refused_and_not_run(folder, name, content, new_format, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save(content, folder / f"{name}.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=f"{name}.pth holds more than weights.*run code"):
        convert_original(folder)
    assert not (folder / "this-must-not-appear").exists()


def truncate(folder):
    path = folder / "D.pth"
    path.write_bytes(path.read_bytes()[:5000])


def drop_tensor(folder):
    change(folder / "G.pth", lambda state: state.pop("blocks.1.0.conv2.weight"))


def add_tensor(folder):
    change(folder / "D.pth", lambda state: state.update(extra=torch.zeros(3)))


def narrow(folder):
    change(folder / "G.pth", lambda state: state.update({"blocks.2.0.conv1.weight": torch.zeros(8, 32, 3, 3)}))


def drop_attention(folder):
    change(folder / "D.pth", lambda state: [state.pop(key) for key in list(state) if key.startswith("blocks.2.1.")])


def drop_block(folder):
    change(folder / "G.pth", lambda state: [state.pop(key) for key in list(state) if key.startswith("blocks.2.")])


def other_optimizer(folder):
    (folder / "G_optim.pth").write_bytes((folder / "D_optim.pth").read_bytes())


def other_run(folder):
    write(folder, networks(num_classes=2)[0], networks()[1])


def not_weights(folder):
    torch.save([1, 2], folder / "G.pth")


def change(path, edit):
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "D.pth is damaged"),
        (drop_tensor, "G: .*1 tensors missing.*blocks.1.residual.conv2.weight"),
        (add_tensor, "D: .*1 unknown.*extra"),
        (narrow, "G: .*1 of another shape"),
        (drop_attention, "D: .*missing.*blocks.2.attention"),
        (drop_block, "G: no architecture has its number of blocks"),
        (other_optimizer, "G_optim.pth is not the state"),
        (other_run, "G has num_classes 2, D 3"),
        (not_weights, "G.pth does not hold"),
    ],
)
def test_bad_files_are_named(tmp_path, damage, message):
    write(tmp_path, *networks(discriminator_resolutions=(16, 8)))
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        convert_original(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        convert_original(tmp_path / "nowhere")


def test_the_command_writes_a_checkpoint_that_samples_and_trains_on(folder, tmp_path, capsys):
    out = tmp_path / "converted.pt"
    assert run_command(convert_biggan.main, [str(folder), str(out)]) == 0
    assert "32 pixels" in capsys.readouterr().out
    sample = ["sample", "--checkpoint", str(out), "--num", "2", "--device", "cpu", "--out"]
    assert run_command(dispatch, [*sample, str(tmp_path / "as_trained.png")]) == 0
    clusters = ["--attention.num-hashes", "2", "--attention.q-cluster-size", "64", "--attention.k-cluster-size", "16"]
    assert run_command(dispatch, [*sample, str(tmp_path / "smyrf.png"), "--attention", "smyrf", *clusters]) == 0
    assert run_command(convert_biggan.main, [str(tmp_path / "nowhere"), str(out)]) == 2
    config, tree = read(out)
    config = replace(
        config,
        data="drawn-faces",
        drawn_faces=8,
        total_kimg=0.004,
        global_batch_size=2,
        device="cpu",
        out=str(tmp_path / "run"),
        initial_weights=str(out),
        log=replace(config.log, grid=2),
    )
    run = train(config)
    steps = {int(state["step"]) for state in run.gan.state_dict()["generator_optimizer"].values()}
    assert steps == {int(state["step"]) + 2 for state in tree["generator_optimizer"].values()}
