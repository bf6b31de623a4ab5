"""Fréchet distances and FID-Inception features against recordings of scipy, pytorch-fid and torch-fidelity."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from golden_support import assert_close, load, recordings
from inception_standin import standin_state

from biggan.metrics.frechet import frechet_distance
from biggan.metrics.inception import FIDInception
from biggan.metrics.inception_weights import load_inception
from biggan.metrics.moments import Moments
from biggan.metrics.resize import resize


def moments_of(features: np.ndarray) -> Moments:
    moments = Moments(features.shape[1])
    for batch in torch.from_numpy(features).split(32):
        moments.update(batch)
    return moments


@recordings("fid*.npz")
def test_frechet_distance(path: Path) -> None:
    recorded = load(path)
    cases = [key.removesuffix("/x") for key in recorded if key.endswith("/x")]
    assert cases
    for case in cases:
        first, second = moments_of(recorded[f"{case}/x"]), moments_of(recorded[f"{case}/y"])
        for name, ours in {
            "mu1": first.mean,
            "mu2": second.mean,
            "tr_s1": first.covariance.trace(),
            "tr_s2": second.covariance.trace(),
        }.items():
            if f"{case}/{name}" in recorded:
                expected = recorded[f"{case}/{name}"]
                assert_close(f"{case}/{name}", ours, expected, "moments", np.abs(expected).max())
        ours = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
        full_rank = min(first.count, second.count) > len(first.mean)
        for name in ("fid_scipy", "fid_eigvals", "fid_eigh"):
            if f"{case}/{name}" in recorded and (full_rank or name == "fid_eigh"):
                expected = recorded[f"{case}/{name}"]
                assert_close(f"{case}/{name}", ours, expected, "fid", float(expected))


@recordings("inception*keys.txt")
def test_inception_keys(path: Path) -> None:
    recorded = {}
    for line in path.read_text().splitlines():
        key, shape = re.match(r"(\S+) \(([\d, ]*)\)", line).groups()
        recorded[key] = tuple(int(size) for size in re.findall(r"\d+", shape))
    assert recorded == {key: tuple(value.shape) for key, value in standin_state().items()}


@recordings("inception*.npz")
def test_inception(path: Path, tmp_path: Path) -> None:
    torch.save(standin_state(), tmp_path / "weights.pth")
    network = load_inception(tmp_path / "weights.pth")
    recorded = load(path)
    if "sha256_of_weights" in recorded:
        assert network.weights_hash == str(recorded["sha256_of_weights"])
    for key in recorded:
        if key.startswith("spot/"):
            assert np.array_equal(standin_state()[key.removeprefix("spot/")].flatten()[:5].numpy(), recorded[key]), key
    sizes = [int(key.removeprefix("img")) for key in recorded if re.fullmatch(r"img\d+", key)]
    assert sizes
    for size in sizes:
        images = torch.from_numpy(recorded[f"img{size}"])
        for rule, names in {
            "pytorch-fid": {
                64: [f"pytorch_fid/block0_mean{size}"],
                192: [f"pytorch_fid/block1_mean{size}"],
                768: [f"pytorch_fid/block2_mean{size}"],
                2048: [f"pytorch_fid/pool{size}"],
                "logits": [f"pytorch_fid/logits{size}"],
            },
            "tensorflow": {
                64: [f"torch_fidelity/f64_{size}"],
                192: [f"torch_fidelity/f192_{size}"],
                768: [f"torch_fidelity/f768_{size}"],
                2048: [f"torch_fidelity/f2048_{size}", f"torch_fidelity/pool_fp64_{size}"],
                "logits": [f"torch_fidelity/flogits_{size}", f"torch_fidelity/logits_fp64_{size}"],
                "logits_unbiased": [f"torch_fidelity/flogits_unbiased_{size}"],
            },
        }.items():
            wanted = [name for group in names.values() for name in group if name in recorded]
            if not wanted:
                continue
            outputs = all_outputs(network, images, rule)
            for output, group in names.items():
                for name in group:
                    if name in recorded:
                        assert_close(name, outputs[output], recorded[name], "inception", 1.0)


@recordings("inception*.npz")
def test_resize(path: Path) -> None:
    recorded = load(path)
    for key, rule in {"resized_tf1_img0": "tensorflow", "resized_halfpixel_img0": "pytorch-fid"}.items():
        if key in recorded and "img64" in recorded:
            ours = resize(torch.from_numpy(recorded["img64"][:1]), 299, rule)
            assert_close(key, ours, recorded[key], "resize", 1.0)


def all_outputs(network: FIDInception, images: torch.Tensor, rule: str) -> dict[int | str, torch.Tensor]:
    """Features and logits, and the spatial means of the maps that enter three layers, by their number of channels."""
    means = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs: means.update({inputs[0].shape[1]: inputs[0].mean((2, 3))}))
        for layer in (network.Conv2d_3b_1x1, network.Mixed_5b, network.Mixed_7a)
    ]
    features = network(images, rule)
    for handle in handles:
        handle.remove()
    logits, unbiased = network.logits(features), network.logits(features, bias=False)
    return {**means, 2048: features, "logits": logits, "logits_unbiased": unbiased}
