"""Feature networks by name: torchvision's and timm's, their files, their sizes, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from biggan.metrics.networks import default_resize_rule, load_network
from biggan.metrics.resize import resize
from runtime.errors import UserError

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")


def images(count: int = 3, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("size", "target"), [(24, 64), (64, 24), (31, 32), (128, 299)])
def test_clean_fid_resizes_as_pillow_on_floats(size: int, target: int) -> None:
    image = images(1, size)
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in image[0]]
    expected = np.stack([np.asarray(c.resize((target, target), Image.Resampling.BICUBIC)) for c in channels])
    np.testing.assert_allclose(resize(image, target, "clean-fid")[0], expected.clip(0, 255), atol=1e-3)


def test_a_torchvision_network_gives_what_its_last_layer_sees(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = torchvision.models.get_model("resnet18").eval()
    torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
    network = load_network("torchvision:resnet18@32", tmp_path / "resnet18.pth")
    assert (network.name, network.feature_dim) == ("torchvision:resnet18@32", 512)
    preset = torchvision.models.get_model_weights("resnet18").DEFAULT.transforms()
    colours = resize(images(), 32, "clean-fid") / 255
    colours = (colours - torch.tensor(preset.mean).view(3, 1, 1)) / torch.tensor(preset.std).view(3, 1, 1)
    features = network(images(), default_resize_rule(network))
    assert torch.allclose(whole.fc(features), whole(colours), atol=1e-4)
    other = load_network("torchvision:resnet18@32", "random")
    assert other.weights_hash != network.weights_hash
    assert other.weights_hash == load_network("torchvision:resnet18@32", "random").weights_hash


@needs_timm
def test_timm_networks_of_two_kinds() -> None:
    dino = load_network("timm:vit_small_patch14_dinov2.lvd142m@28", "random")
    assert (dino.name, dino.feature_dim, dino.size) == ("timm:vit_small_patch14_dinov2.lvd142m@28", 384, 28)
    features = dino(images(), default_resize_rule(dino))
    assert features.shape == (3, 384) and features.std(dim=0).min() > 0
    assert load_network("timm:resnet10t@40", "random")(images(), "clean-fid").shape == (3, 512)


@needs_timm
def test_timm_weights_from_a_file(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    whole = timm.create_model("resnet10t", pretrained=False).eval()
    torch.save(whole.state_dict(), tmp_path / "resnet10t.pth")
    network = load_network("timm:resnet10t@32", tmp_path / "resnet10t.pth")
    found = {key: value for key, value in whole.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(network.body.state_dict()[key], value) for key, value in found.items())
    with pytest.raises(UserError, match="nothing.pth does not hold weights of timm:resnet10t"):
        load_network("timm:resnet10t@32", tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", r"unknown feature network 'inception'; choose from fid-inception, torchvision:NAME\[@SIZE\]"),
        ("torchvision:resnet18@big", "unknown feature network"),
        ("torchvision:resnet", "torchvision has no network 'resnet'; it has alexnet"),
        ("torchvision:squeezenet1_1", "ends in no linear layer"),
        ("torchvision:vit_b_32@50", "cannot be had here|does not take images of 50"),
    ],
)
def test_what_cannot_be_had_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_network(name, "random")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth does not hold weights of torchvision:resnet18"):
        load_network("torchvision:resnet18", tmp_path / "other.pth")
