"""SMYRF and HRR attention against recordings of the original implementations (names and shapes: the golden READMEs)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_support import assert_close, load, recordings

from attention import HRRSelfAttention, clustered_attention, hrr_attention, smyrf_attention
from attention.smyrf.clusters import cluster_orders, sort_tokens
from attention.smyrf.hashing import HASH_FAMILIES
from attention.smyrf.transforms import TRANSFORMS
from tests.native import native


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in load(path).items() if value.dtype.kind in "fi"}


def check(name: str, value: torch.Tensor, recorded: torch.Tensor, tolerance: str) -> None:
    """Relative to the largest entry of the recording."""
    assert_close(name, value, recorded, tolerance, recorded.abs().max().item())


class SmyrfRecording:
    """A smyrf_*.npz file as one head per recorded row, with its mask as ours."""

    def __init__(self, path: Path) -> None:
        self.data = tensors(path)
        self.q, self.k, self.v = (self.data[name][:, None].requires_grad_() for name in "qkv")  # (bs, 1, N, D)
        meta = self.data["meta"].tolist()
        self.sizes = int(meta[1]), int(meta[2])
        self.scale = 1.0 / meta[4]
        self.mask = None
        self.real = torch.ones(self.q.shape[0], self.q.shape[2], dtype=torch.bool)
        if "attn_mask" in self.data:
            rows = torch.arange(self.q.shape[0]) % self.data["attn_mask"].shape[0]  # the original tiles its mask
            self.mask = self.data["attn_mask"][rows] != 0
            self.real = ~self.mask

    def orders(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The recorded positions as (R, B, H, N)."""
        return tuple(self.data[f"{side}_positions"].long()[:, :, None] for side in "qk")

    def orders_of_the_original(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Our pieces put together as the original does: norms over masked tokens too, and -10000 in place of -inf."""
        q, k = self.q.detach(), self.k.detach()
        q_max, k_max = (x.norm(dim=-1, keepdim=True).amax(2, keepdim=True) for x in (q, k))
        transformed = TRANSFORMS["xbox+"].apply(q, k, q_max, k_max)
        hashed = [HASH_FAMILIES["e2lsh"].sort_keys(x, self.data["alpha"]) + self.data["beta"] for x in transformed]
        if self.mask is not None:
            hashed = [x + 10000.0 * self.mask[:, None, :, None] for x in hashed]
        return tuple(sort_tokens(x, None) for x in hashed)

    def check_order(self, ours: torch.Tensor, recorded: torch.Tensor) -> None:
        """Masked tokens come last in both; among them the original's order is rounding noise."""
        for row, real in enumerate(self.real.sum(1).tolist()):
            real = real if ours.shape[-1] == self.real.shape[1] else ours.shape[-1]
            assert torch.equal(ours[:, row, :, :real], recorded[:, row, :, :real])

    def check_run(self, out: torch.Tensor) -> None:
        """Output and gradients; rows of masked tokens are undefined where their clusters hold no key."""
        grads = torch.autograd.grad(out.square().sum(), (self.q, self.k, self.v))
        keep = self.real[:, None, :, None]
        check("output", out * keep, self.data["out"][:, None] * keep, "smyrf_output")
        for name, grad in zip("qkv", grads, strict=True):
            recorded = self.data[f"grad_{name}"][:, None]
            keep_rows = keep if grad.shape[2] == keep.shape[2] else 1.0
            check(f"gradient of {name}", grad * keep_rows, recorded * keep_rows, "smyrf_gradient")


@recordings("smyrf_*.npz")
def test_smyrf_orders(path):
    recording = SmyrfRecording(path)
    if "q_positions" not in recording.data:
        pytest.skip("no positions recorded")
    orders = recording.orders_of_the_original()
    for ours, recorded in zip(orders, recording.orders(), strict=True):
        recording.check_order(ours, recorded)
    if recording.mask is None:
        ours = cluster_orders(recording.q, recording.k, recording.data["alpha"], *recording.sizes)
        assert all(torch.equal(a, b) for a, b in zip(ours, orders, strict=True))


@pytest.mark.parametrize("backend", ["einsum", "flash", native])
@recordings("smyrf_*.npz")
def test_smyrf_in_recorded_clusters(path, backend):
    recording = SmyrfRecording(path)
    if "q_positions" not in recording.data:
        pytest.skip("no positions recorded")
    out = clustered_attention(
        recording.q,
        recording.k,
        recording.v,
        *recording.orders(),
        *recording.sizes,
        recording.scale,
        recording.mask,
        backend=backend,
    )
    recording.check_run(out)


@pytest.mark.parametrize("backend", ["einsum", "flash", native])
@recordings("smyrf_*.npz")
def test_smyrf_from_projections(path, backend):
    """From q, k, v and the hash directions alone."""
    recording = SmyrfRecording(path)
    inputs, sizes, scale = (recording.q, recording.k, recording.v), recording.sizes, recording.scale
    if recording.mask is None:
        out = smyrf_attention(*inputs, recording.data["alpha"], *sizes, scale, backend=backend)
    else:
        orders = recording.orders_of_the_original()  # ours never let masked tokens choose clusters
        out = clustered_attention(*inputs, *orders, *sizes, scale, recording.mask, backend=backend)
    recording.check_run(out)


@recordings("hrrformer/attn_*.npz")
def test_hrr(path):
    """The layer with the original's treatment of masks; flax kernels are (in, out)."""
    data = tensors(path)
    x = data["inputs"].requires_grad_()
    mask = None if "mask" not in data else data["mask"][:, 0, :, 0] == 0
    layer = HRRSelfAttention(x.shape[-1], int(data["heads"]), mask_superposition=False)
    names = ("query", "key", "value", "output")
    for name in names:
        getattr(layer, name).weight.data = data[f"param/{name}/kernel"].T.contiguous()
    out = layer(x, mask)
    out.square().sum().backward()
    check("output", out, data["output"], "hrr_output")
    check("gradient of inputs", x.grad, data["grad_inputs"], "hrr_gradient")
    for name in names:
        check(f"gradient of {name}", getattr(layer, name).weight.grad.T, data[f"grad/{name}/kernel"], "hrr_gradient")
    q, k, v = (
        getattr(layer, name)(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    weights = hrr_attention(q, k, v, mask, return_weights=True, mask_superposition=False)[1]
    check("weights", weights, data["weights"][..., 0], "hrr_output")
