"""The networks, losses and optimisation steps against recordings of the original."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_support import TOLERANCES, assert_close, load, recordings
from torch import Tensor, nn

from attention import SpatialAttention, clustered_attention, smyrf_attention
from biggan.conversion import infer_discriminator, infer_generator, rename_original
from biggan.discriminator import Discriminator
from biggan.ema import update_ema
from biggan.generator import Generator
from biggan.losses import (
    hinge_discriminator_loss,
    hinge_generator_loss,
    nonsaturating_discriminator_loss,
    nonsaturating_generator_loss,
)


def part(data: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix/`, as tensors under our names."""
    prefix += "/"
    found = {key.removeprefix(prefix): torch.from_numpy(data[key]) for key in data if key.startswith(prefix)}
    return rename_original(found)


def build(state: dict[str, Tensor]) -> Generator | Discriminator:
    """A network with dense attention of the architecture and weights of `state`."""
    if "embed.weight" in state:
        network = Discriminator(**infer_discriminator(state), attention="dense")
    else:
        network = Generator(**infer_generator(state), attention="dense")
    network.load_state_dict(state)
    return network


def inputs(data: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(data["z" if "z" in data else "x"]), torch.from_numpy(data["y"])


class RecordedSmyrf(nn.Module):
    """SMYRF with recorded projections, and with the recorded clusters where ours differ in a token at a boundary."""

    def __init__(self, projections: Tensor, sizes: tuple[int, int], orders: tuple[Tensor, Tensor] | None):
        super().__init__()
        self.projections, self.sizes, self.orders = projections, sizes, orders

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, ours = smyrf_attention(q, k, v, self.projections, *self.sizes, scale=1.0, return_clusters=True)
        if self.orders is None:
            return out
        for our, recorded, size in zip(ours, self.orders, self.sizes, strict=True):
            moved = our.argsort(-1) // size != recorded.argsort(-1) // size
            assert moved.float().mean().item() <= TOLERANCES["gan_clusters"]
        return clustered_attention(q, k, v, *self.orders, *self.sizes, scale=1.0)


def place_smyrf(network: nn.Module, data: dict[str, np.ndarray], mode: str) -> None:
    _, q_size, k_size, *_ = (int(number) for number in data["smyrf_cfg"])
    for name, module in network.named_modules():
        if not isinstance(module, SpatialAttention):
            continue
        original = name.replace(".attention", ".1")
        keys = [f"{side}_positions_{mode}/{original}" for side in "qk"]
        orders = None
        if all(key in data for key in keys):
            orders = tuple(torch.from_numpy(data[key].astype(np.int64))[:, :, None] for key in keys)  # (R, B, 1, N)
        module.attention = RecordedSmyrf(torch.from_numpy(data[f"alpha/{original}"]), (q_size, k_size), orders)


@recordings("gan_*.npz")
def test_gan_outputs(path):
    data = load(path)
    network = build(part(data, "sd"))
    with torch.no_grad():
        assert_close("eval, dense", network.eval()(*inputs(data)), data["out_eval_dense"], "gan_outputs")
        assert_close("train, dense", network.train()(*inputs(data)), data["out_train_dense"], "gan_outputs")


@recordings("gan_*.npz")
def test_gan_buffers_after_one_training_forward(path):
    data = load(path)
    before, recorded = part(data, "sd"), part(data, "after_train")
    network = build(before).train()
    with torch.no_grad():
        network(*inputs(data))
    compared = 0
    for name, buffer in network.named_buffers():
        if "stored_" in name and torch.equal(recorded.get(name, before[name]), before[name]):
            continue  # these recordings show the batch norms' statistics after the forward in both places
        assert_close(name, buffer, recorded.get(name, before[name]).numpy(), "gan_buffers")
        compared += 1
    assert compared


@recordings("gan_*.npz")
def test_gan_singular_values(path):
    data = load(path)
    network = build(part(data, "sd")).eval()
    layers = dict(network.named_modules())
    for name, recorded in part(data, "sigma_eval").items():
        layer = layers[_module_name(name)]
        ratio = layer.weight.detach() / layer.normalized_weight().detach()
        assert_close(name, ratio[layer.weight != 0].median().reshape(1), recorded.numpy(), "gan_buffers")


def _module_name(original: str) -> str:
    return next(iter(rename_original({f"{original}.weight": torch.empty(0)}))).removesuffix(".weight")


@recordings("gan_*.npz")
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gan_outputs_with_smyrf(path, mode):
    data = load(path)
    if f"out_{mode}_smyrf" not in data:
        pytest.skip("this network has no attention")
    network = build(part(data, "sd"))
    place_smyrf(network, data, mode)
    with torch.no_grad():
        out = network.train(mode == "train")(*inputs(data))
    assert_close(f"{mode}, smyrf", out, data[f"out_{mode}_smyrf"], "gan_outputs")


@recordings("losses.npz")
def test_losses(path):
    data = load(path)
    real, fake = (torch.from_numpy(data[key]).requires_grad_() for key in ("d_real", "d_fake"))

    loss_real, loss_fake = hinge_discriminator_loss(real, fake)
    assert_close("hinge, real", loss_real, data["hinge_d_real"], "losses")
    assert_close("hinge, fake", loss_fake, data["hinge_d_fake"], "losses")
    grad_real, grad_fake = torch.autograd.grad(loss_real + loss_fake, (real, fake))
    assert_close("hinge gradient, real", grad_real, data["hinge_d_grad_real"], "losses")
    assert_close("hinge gradient, fake", grad_fake, data["hinge_d_grad_fake"], "losses")
    loss = hinge_generator_loss(fake)
    assert_close("hinge, generator", loss, data["hinge_g"], "losses")
    assert_close("hinge gradient, generator", torch.autograd.grad(loss, fake)[0], data["hinge_g_grad"], "losses")

    loss_real, loss_fake = nonsaturating_discriminator_loss(real, fake)
    assert_close("nonsaturating, real", loss_real, data["dcgan_d_real"], "losses")
    assert_close("nonsaturating, fake", loss_fake, data["dcgan_d_fake"], "losses")
    assert_close("nonsaturating, generator", nonsaturating_generator_loss(fake), data["dcgan_g"], "losses")


@recordings("train_*.npz")
def test_training(path):
    """Three iterations of two discriminator steps and one generator step.

    In float64, so that only the recording's rounding counts: in float32 a ReLU's input that lies within rounding of
    zero may fall on either side, and Adam's first steps turn that into whole steps.
    """
    data = load(path)
    tensors = {key: torch.from_numpy(value) for key, value in data.items() if "/" not in key}
    tensors = {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}
    generator, ema_generator = (build(part(data, "init/G")).double().train() for _ in range(2))
    discriminator = build(part(data, "init/D")).double().train()
    generator_adam = torch.optim.Adam(generator.parameters(), lr=5e-5, betas=(0.0, 0.999), eps=1e-6)
    discriminator_adam = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.0, 0.999), eps=1e-6)

    for i in range(len(tensors["x"])):
        for j in range(len(tensors["x"][i])):
            step = i * len(tensors["x"][i]) + j
            with torch.no_grad():
                fake = generator(tensors["z_D"][i, j], tensors["y_D"][i, j])
            labels = torch.cat([tensors["y_D"][i, j], tensors["y"][i, j]])
            logits_fake, logits_real = discriminator(torch.cat([fake, tensors["x"][i, j]]), labels).chunk(2)
            loss_real, loss_fake = hinge_discriminator_loss(logits_real, logits_fake)
            # A loss is a mean of logits of both signs: its scale is theirs.
            ours = torch.cat([logits_real.flatten(), logits_fake.flatten(), torch.stack([loss_real, loss_fake])])
            recorded = [data[key][step].ravel() for key in ("D_real", "D_fake", "D_loss_real", "D_loss_fake")]
            assert_close(f"D step {step}", ours.detach(), np.concatenate(recorded), "train_losses")
            discriminator_adam.zero_grad()
            (loss_real + loss_fake).backward()
            if step == 0:
                close_gradients(discriminator, part(data, "gradD_step0"))
            discriminator_adam.step()
            if step == 0:
                close_states(discriminator, part(data, "after_first_D_step/D"), "train_first_step")

        logits = discriminator(generator(tensors["z_G"][i], tensors["y_G"][i]), tensors["y_G"][i])
        loss = hinge_generator_loss(logits)
        ours = torch.cat([logits.flatten(), loss.reshape(1)])
        recorded = [data[key][i].ravel() for key in ("G_D_fake", "G_loss")]
        assert_close(f"G step {i}", ours.detach(), np.concatenate(recorded), "train_losses")
        generator_adam.zero_grad()
        loss.backward()
        if i == 0:
            close_gradients(generator, part(data, "gradG_step0"))
        generator_adam.step()
        update_ema(ema_generator, generator, torch.tensor(1.0 if i + 1 < 2 else 0.1))  # decay 0.9 from iteration 2 on
        for moment, tolerance in (("after_itr1", "train_first_step"), ("after_itr3", "train_third_iteration")):
            if moment == f"after_itr{i + 1}":
                close_states(generator, part(data, f"{moment}/G"), tolerance)
                close_states(discriminator, part(data, f"{moment}/D"), tolerance)
                close_states(ema_generator, part(data, f"{moment}/G_ema"), tolerance)


def close_gradients(network: nn.Module, recorded: dict[str, Tensor]) -> None:
    """Relative to the largest gradient in each tensor; biases before a batch norm have none but noise."""
    parameters = dict(network.named_parameters())
    assert recorded.keys() <= parameters.keys()
    for name, gradient in recorded.items():
        if isinstance(network, Generator) and name.endswith("conv1.bias"):
            continue
        scale = gradient.abs().max()
        assert_close(
            f"gradient of {name}", parameters[name].grad / scale, (gradient / scale).numpy(), "train_gradients"
        )


def close_states(network: nn.Module, recorded: dict[str, Tensor], tolerance: str) -> None:
    state = network.state_dict()
    assert recorded.keys() <= state.keys()
    for name, tensor in recorded.items():
        if isinstance(network, Generator) and name.endswith("conv1.bias"):
            continue  # their true gradient is zero: Adam turns its rounding noise into steps
        assert_close(name, state[name], tensor.numpy(), tolerance)
