"""Finding, checking and loading the weights of the FID-Inception network.

pytorch-fid and torch-fidelity publish the same file under two names; the eight hexadecimal digits in the name are the
beginning of its SHA-256. Eight digits tell damage; against a forgery all 64 are compared.
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import torch
from torch import Tensor

from biggan.metrics.inception import ConvReLU, FIDInception
from runtime.errors import UserError
from runtime.torch_files import read_torch_file

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
FILE_NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DOWNLOAD_TIMEOUT_SEC = 30
BATCH_NORM_EPS = 1e-3  # of the TensorFlow graph; torch's default is 1e-5


def load_inception(weights: str | Path | None = None, device: torch.device | str = "cpu") -> FIDInception:
    """The FID-Inception network with its weights, ready to infer.

    Args:
        weights: a weights file. None takes the file named by the environment variable INCEPTION_WEIGHTS, else the
            standard file in torch.hub's cache folder, else downloads it there; the standard file is verified by its
            checksum.

    Raises:
        UserError: no such file, not FID-Inception weights, damaged, or not to be had without a network.
    """
    weights = weights or os.environ.get("INCEPTION_WEIGHTS")
    path = Path(weights) if weights else _standard_file()
    state = _read_state(path)
    with torch.device("meta"):  # names and shapes only: the file has the values
        network = FIDInception()
    _check_state(state, network, path)
    network.load_state_dict(fold_batch_norm(state), assign=True)
    network.weights_hash = hash_weights(state)
    return network.to(device, memory_format=torch.channels_last)


def hash_weights(state: dict[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, over the sorted keys, each followed by its tensor's bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def fold_batch_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a weights file, with batch norms -> the tensors of `FIDInception`, without.

    A batch norm in inference is `gain * (W x - mean) / sqrt(variance + eps) + bias`: a convolution with the kernels
    `scale * W` and the biases `bias - scale * mean`, where `scale = gain / sqrt(variance + eps)`. Folded in float64.
    """
    folded = {"fc.weight": state["fc.weight"], "fc.bias": state["fc.bias"]}
    for key, kernels in state.items():
        if key.endswith(".conv.weight"):
            layer = key.removesuffix("conv.weight")
            gain, bias, mean, variance = (
                state[f"{layer}bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gain / torch.sqrt(variance + BATCH_NORM_EPS)
            folded[key] = (kernels.double() * scale.view(-1, 1, 1, 1)).float()
            folded[f"{layer}conv.bias"] = (bias - scale * mean).float()
    return folded


def _standard_file() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILE_NAMES:
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                    raise UserError(f"{path} is damaged (its checksum is wrong): delete it and run again")
            return path
    path = folder / FILE_NAMES[0]
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SEC)  # torch.hub sets none: behind a silent firewall it would hang
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=SHA256)
    except (OSError, RuntimeError) as error:  # no network, refused, disk full; RuntimeError: wrong checksum
        raise UserError(
            f"the FID needs the Inception weights, and downloading them failed ({error}). Fetch {WEIGHTS_URL}\n"
            f"on a machine with a network, then put the file into {folder} or pass --inception-weights PATH"
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)
    return path


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = read_torch_file(path)
    except OSError as error:
        raise UserError(f"cannot read the Inception weights {path}: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{error} Fetch {WEIGHTS_URL}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no dictionary of tensors (fetch {WEIGHTS_URL})")
    return state


def _check_state(state: dict[str, Tensor], network: FIDInception, path: Path) -> None:
    """Every key there, with its shape, and no other; `num_batches_tracked`, which inference never reads, may lack."""
    expected = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, layer in network.named_modules():
        if isinstance(layer, ConvReLU):
            expected[f"{name}.conv.weight"] = tuple(layer.conv.weight.shape)
            for part in ("weight", "bias", "running_mean", "running_var"):
                expected[f"{name}.bn.{part}"] = (layer.conv.out_channels,)
    given = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("bn.num_batches_tracked")}
    wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{path} does not hold FID-Inception weights: {len(wrong)} tensors missing, unknown or misshapen, such as "
            f"{key}\n(expected {expected.get(key, 'none')}, found {given.get(key, 'none')}). Fetch {WEIGHTS_URL}"
        )
