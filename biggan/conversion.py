"""Turns the checkpoints of BigGAN-PyTorch and of SMYRF's trainers into the state of networks of this package.

Nothing but the shapes says reliably of which architecture a file is (the configuration may be missing), so it is read
off them. The optimizers number their parameters in the order in which the networks' files list them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biggan.architectures import DISCRIMINATOR_WIDTHS, GENERATOR_WIDTHS, discriminator_blocks, generator_blocks
from biggan.discriminator import Discriminator
from biggan.generator import Generator
from biggan.original_files import read_original
from runtime.errors import UserError
from runtime.state import MOMENTS

State = dict[str, Tensor]

# Original name -> name here, applied in turn.
_RENAMES = [
    # Statistics live one module deeper where the batch norm was trained across devices.
    (re.compile(r"\.bn\.(?:running|stored)_(mean|var)$"), r".stored_\1"),
    (re.compile(r"^blocks\.(\d+)\.0\."), r"blocks.\1.residual."),
    (re.compile(r"^blocks\.(\d+)\.1\."), r"blocks.\1.attention."),
    (re.compile(r"\.conv_sc\."), ".shortcut."),
    (re.compile(r"^output_layer\.0\."), "output.bn."),
    (re.compile(r"^output_layer\.2\."), "output.conv."),
]
_COUNTERS = ("num_batches_tracked", "accumulation_counter")
_BUFFERS = ("u0", "sv0", "stored_mean", "stored_var")


def convert_original(directory: str | Path, suffix: str | None = None) -> dict[str, Any]:
    """Converts a folder of original files; `suffix` chooses among several copies ("copy0", "best1").

    Returns:
        generator, ema_generator, discriminator: state dicts under the names of this package.
        generator_optimizer, discriminator_optimizer: Adam's state, {parameter name: {step, exp_avg, exp_avg_sq}}.
            Of these five, those whose files are missing are left out.
        model: resolution, generator_channels, discriminator_channels, dim_z, num_classes, shared_dim, hierarchical.
            Without a discriminator its width is that of the generator.
        attention: name, generator_resolutions, discriminator_resolutions, options. The mechanism is smyrf where the
            stored configuration has cluster sizes, else dense; the weights suit either.
        optimizer: of generator_lr, discriminator_lr, beta1, beta2, epsilon what the files hold.
        step: generator updates done, 0 where that is not known.
        missing: names of the files that are not there.

    Raises:
        UserError: the folder or both generators are missing; a file is damaged, holds code, or is of an architecture
            that this package does not have; the files do not belong together.
    """
    contents, missing = read_original(Path(directory), suffix)
    networks = {name: _rename(contents[name], name) for name in ("G", "G_ema", "D") if name in contents}
    generator = infer_generator(networks["G"] if "G" in networks else networks["G_ema"])
    discriminator = {**generator, "attention_resolutions": ()}
    if "D" in networks:
        discriminator = infer_discriminator(networks["D"])
        _check(Discriminator, discriminator, networks["D"], "D")
    for name in networks.keys() - {"D"}:
        _check(Generator, generator, networks[name], name)
    for key in ("resolution", "num_classes"):
        if generator[key] != discriminator[key]:
            raise UserError(f"G has {key} {generator[key]}, D {discriminator[key]}: they are of different runs.")

    progress = contents.get("state_dict", {})
    attention, options = _mechanism(progress.get("config", {}))
    names = {"G": "generator", "G_ema": "ema_generator", "D": "discriminator"}
    return {
        **{names[name]: state for name, state in networks.items()},
        **{
            f"{names[name]}_optimizer": _adam_state(contents[f"{name}_optim"], networks[name], name)
            for name in ("G", "D")
            if name in networks and f"{name}_optim" in contents
        },
        "model": {
            "resolution": generator["resolution"],
            "generator_channels": generator["channels"],
            "discriminator_channels": discriminator["channels"],
            **{key: generator[key] for key in ("dim_z", "num_classes", "shared_dim", "hierarchical")},
        },
        "attention": {
            "name": attention,
            "generator_resolutions": generator["attention_resolutions"],
            "discriminator_resolutions": discriminator["attention_resolutions"],
            "options": options,
        },
        "optimizer": _hyperparameters(contents),
        "step": int(progress.get("itr", 0)),
        "missing": missing,
    }


def rename_original(state: State) -> State:
    """A state dict of the original under the names of this package, in the same order; counters are dropped."""
    renamed = {}
    for key, tensor in state.items():
        if _leaf(key) in _COUNTERS:
            continue
        for pattern, replacement in _RENAMES:
            key = pattern.sub(replacement, key)
        renamed[key] = tensor
    return renamed


def infer_generator(state: State) -> dict[str, Any]:
    """The arguments of `Generator`, but for the mechanism, that fit a renamed state dict.

    Raises:
        UserError: a tensor that the shapes are read off is missing, or no architecture has this number of blocks.
    """
    num_blocks = _num_blocks(state)
    resolution = _resolution(GENERATOR_WIDTHS, num_blocks + 1, "G")
    channels = _shape(state, "blocks.0.residual.conv1.weight", "G")[1] // GENERATOR_WIDTHS[resolution][0]
    gain_shape = _shape(state, "blocks.0.residual.bn1.gain.weight", "G")
    if "shared.weight" in state:  # then the gains are linear maps of the shared embedding, and of a chunk of z
        num_classes, shared_dim = _shape(state, "shared.weight", "G")
        hierarchical = gain_shape[1] > shared_dim
    else:  # else embeddings of the class
        num_classes, shared_dim, hierarchical = gain_shape[0], 0, False
    num_chunks = num_blocks + 1 if hierarchical else 1
    sizes = [spec.resolution for spec in generator_blocks(resolution, channels, ())]
    return {
        "resolution": resolution,
        "channels": channels,
        "dim_z": num_chunks * _shape(state, "linear.weight", "G")[1],
        "num_classes": num_classes,
        "shared_dim": shared_dim,
        "hierarchical": hierarchical,
        "attention_resolutions": _attention_resolutions(state, sizes),
    }


def infer_discriminator(state: State) -> dict[str, Any]:
    """The arguments of `Discriminator`, but for the mechanism, that fit a renamed state dict; errors as above."""
    resolution = _resolution(DISCRIMINATOR_WIDTHS, _num_blocks(state), "D")
    channels = _shape(state, "blocks.0.residual.conv1.weight", "D")[0] // DISCRIMINATOR_WIDTHS[resolution][0]
    sizes = [spec.resolution for spec in discriminator_blocks(resolution, channels, ())]
    return {
        "resolution": resolution,
        "channels": channels,
        "num_classes": _shape(state, "embed.weight", "D")[0],
        "attention_resolutions": _attention_resolutions(state, sizes),
    }


def _num_blocks(state: State) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("blocks.")})


def _resolution(table: dict[int, tuple[int, ...]], num_widths: int, name: str) -> int:
    for resolution, widths in table.items():
        if len(widths) == num_widths:
            return resolution
    raise UserError(f"{name}: no architecture has its number of blocks; resolutions are {', '.join(map(str, table))}.")


def _shape(state: State, key: str, name: str) -> torch.Size:
    if key not in state:
        raise UserError(f"{name}: not of a known architecture: {key} is missing.")
    return state[key].shape


def _attention_resolutions(state: State, sizes: list[int]) -> tuple[int, ...]:
    return tuple(sorted({size for i, size in enumerate(sizes) if f"blocks.{i}.attention.gamma" in state}))


def _rename(state: dict[str, Any], name: str) -> State:
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()):
        raise UserError(f"{name}.pth does not hold the weights of a network.")
    return rename_original(state)


def _check(network: type[nn.Module], arguments: dict[str, Any], state: State, name: str) -> None:
    """Every tensor of the network is there in its shape, and no other."""
    try:
        with torch.device("meta"):
            expected = network(**arguments, attention="dense").state_dict()
    except ValueError as error:
        raise UserError(f"{name}: not of a known architecture: {error}.") from None
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    different = {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape}
    if missing or unknown or different:
        raise UserError(
            f"{name}: not of a known architecture: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(different)} of another shape (first: {min(missing or unknown or different)})."
        )


def _adam_state(optimizer: dict[str, Any], network: State, name: str) -> dict[str, dict[str, Tensor]]:
    """Adam's state by our parameter names."""
    names = [key for key in network if _leaf(key) not in _BUFFERS]
    named = {}
    try:
        for index, state in optimizer["state"].items():
            moments = {moment: state[moment] for moment in MOMENTS}
            key = names[index]
            if any(moment.shape != network[key].shape for moment in moments.values()):
                raise ValueError(key)
            named[key] = {"step": torch.as_tensor(state["step"], dtype=torch.float32), **moments}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UserError(f"{name}_optim.pth is not the state of an Adam optimizer of {name}.pth.") from None
    return named


def _hyperparameters(contents: dict[str, Any]) -> dict[str, float]:
    """Adam's settings as the optimizers' files have them."""
    settings = {}
    for name, rate in (("D_optim", "discriminator_lr"), ("G_optim", "generator_lr")):
        for group in contents.get(name, {}).get("param_groups", [])[:1]:
            beta1, beta2 = group["betas"]
            settings |= {rate: group["lr"], "beta1": beta1, "beta2": beta2, "epsilon": group["eps"]}
    return settings


def _mechanism(config: dict[str, Any]) -> tuple[str, dict[str, int]]:
    originals = {"num_hashes": "n_hashes", "q_cluster_size": "q_cluster_size", "k_cluster_size": "k_cluster_size"}
    if all(config.get(original) for original in originals.values()):
        return "smyrf", {option: int(config[original]) for option, original in originals.items()}
    return "dense", {}


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]
