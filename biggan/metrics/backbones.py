"""Feature networks of torchvision and timm behind the protocol of the FID's, so that a distance is not tied to one.

Features of Inception, trained on ImageNet's classes, ignore much of what people see; those of DINOv2 agree best with
human judgement (Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", arXiv:2306.04675).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biggan.metrics.inception import full_float32
from biggan.metrics.inception_weights import hash_weights
from biggan.metrics.resize import resize
from runtime.errors import UserError
from runtime.torch_files import read_torch_file

RANDOM = "random"
RANDOM_SEED = 0


class Backbone(nn.Module):
    """A classifier without its last layer, with the size and colour scale that it was trained on.

    Args:
        name: the feature network's name in statistics files.
        body: images (B, 3, S, S) -> features (B, feature_dim).
        mean, std: of the colours 0..1 that become 0 and 1.
    """

    def __init__(self, name: str, body: nn.Module, size: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.name, self.size, self.body = name, size, body
        self.weights_hash = hash_weights(body.state_dict())
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        self.feature_dim = self(torch.zeros(1, 3, size, size, dtype=torch.uint8), "clean-fid").shape[1]

    @torch.no_grad()
    @full_float32()
    def forward(self, images: Tensor, resize_rule: str) -> Tensor:
        """uint8 images (B, 3, H, W) of any size -> float32 features (B, feature_dim)."""
        x = (resize(images, self.size, resize_rule) - self.mean) / self.std
        return self.body(x.contiguous(memory_format=torch.channels_last))


def load_torchvision(name: str, weights: str | Path | None, size: int | None) -> Backbone:
    """Any classifier of `torchvision.models`, to the input of its last linear layer.

    Args:
        weights: a file of its state_dict, "random", or None for torchvision's own, which it downloads.
        size: of the images it sees; default what its own weights were trained on.

    Raises:
        UserError: no such network, weights of another, or none to be had.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(f"torchvision has no network {name!r}; it has {', '.join(names)}")
    default = torchvision.models.get_model_weights(name).DEFAULT
    preset = default.transforms()
    options = {"image_size": size} if size and name.startswith("vit") else {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            body = torchvision.models.get_model(name, weights=None if weights else default, **options)
        if weights and weights != RANDOM:
            body.load_state_dict(read_torch_file(Path(weights)))
    except Exception as error:  # no network, no or a damaged file, tensors of another network: many types
        raise _not_to_be_had(f"torchvision:{name}", weights, error) from error
    linear = [key for key, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"torchvision:{name} ends in no linear layer, so that it has no features to compare")
    body.set_submodule(linear[-1], nn.Identity())
    return _backbone("torchvision", name, body, size or preset.crop_size[0], list(preset.mean), list(preset.std))


def load_timm(name: str, weights: str | Path | None, size: int | None) -> Backbone:
    """Any network of timm, such as `vit_small_patch14_dinov2.lvd142m`, to its pooled features.

    Args:
        weights: a file of its weights (timm's or its authors'), "random", or None for timm's own, from the Hugging Face
            hub.
        size: of the images it sees; default what its weights were trained on.

    Raises:
        UserError: timm is not installed, no such network, weights of another, or none to be had.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError("networks named timm:... need timm; install it with: pip install '.[timm]'") from error
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('.')[0]}*")[:10]
        raise UserError(f"timm has no network {name!r}; near it: {', '.join(similar) or 'see timm.list_models()'}")
    options = {"num_classes": 0, "pretrained": weights != RANDOM}
    try:
        if weights not in (None, RANDOM):
            options["pretrained_cfg_overlay"] = _timm_weights(Path(weights))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            try:
                body = timm.create_model(name, img_size=size, **options)  # None is as if it were not there
            except TypeError:  # a network that takes images of any size, not of one
                body = timm.create_model(name, **options)
    except Exception as error:  # as above
        raise _not_to_be_had(f"timm:{name}", weights, error) from error
    trained_on = timm.data.resolve_model_data_config(body)
    size = size or trained_on["input_size"][-1]
    return _backbone("timm", name, body, size, list(trained_on["mean"]), list(trained_on["std"]))


def _timm_weights(path: Path) -> dict[str, Any]:
    """What tells timm to take a file: timm reads safetensors itself, and gets torch's files as we read them."""
    if path.suffix == ".safetensors":
        return {"file": str(path)}
    from timm.models import clean_state_dict

    content = read_torch_file(path)
    wrappers = ("state_dict_ema", "model_ema", "state_dict", "model")  # that training programs put weights into
    return {"state_dict": clean_state_dict(next((content[key] for key in wrappers if key in content), content))}


def _backbone(library: str, name: str, body: nn.Module, size: int, mean: list[float], std: list[float]) -> Backbone:
    try:
        return Backbone(f"{library}:{name}@{size}", body, size, mean, std)
    except (RuntimeError, AssertionError) as error:  # it is tried on one image
        raise UserError(f"{library}:{name} does not take images of {size} pixels: {error}") from error


def _not_to_be_had(name: str, weights: str | Path | None, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if weights in (None, RANDOM):
        return UserError(f"{name} cannot be had here ({reason}); give the file of its weights: --network-weights PATH")
    return UserError(f"{weights} does not hold weights of {name}: {reason}")
