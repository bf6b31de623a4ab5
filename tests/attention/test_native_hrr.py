"""The folded HRR layer's passes in C: widths around those of vectors, panels and tiles; threads; strides."""

import pytest
import torch

from attention import HRRSelfAttention
from attention.hrr import native
from attention.native_support import FLAGS, load_kernels
from tests.native import needs_native
from tests.tolerance import assert_close

pytestmark = needs_native
SIZES = [(10, 2, 43), (6, 2, 57), (32, 4, 144), (33, 3, 145), (64, 1, 263)]  # channels, heads, tokens: tiles have 48


def build(dim, heads, **options):
    torch.manual_seed(0)
    return HRRSelfAttention(dim, heads, **options)


def draw(dim, tokens):
    torch.manual_seed(1)
    x = torch.randn(3, tokens, dim).requires_grad_()
    mask = torch.rand(3, tokens) < 0.4
    mask[-1] = True  # every token of the last row
    return x, mask


def run(layer, x, mask):
    """Output and the gradients of x and of every parameter."""
    out = layer(x, mask)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return out, *torch.autograd.grad(out, [x, *layer.parameters()], direction)


def check(dim, heads, tokens, masked=False, **options):
    """Against the plain expression in float64."""
    layer, plain = build(dim, heads, **options), build(dim, heads, **options, backend="plain").double()
    x, mask = draw(dim, tokens)
    mask = mask if masked else None
    assert native.supports(x)
    exact = run(plain, x.detach().double().requires_grad_(), mask)
    for ours, theirs in zip(run(layer, x, mask), exact, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_plain_expression(size, recompute, masked, bias):
    check(*size, masked, bias=bias, recompute=recompute)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_width_of_vectors(lanes, monkeypatch):
    """Those of other processors too."""
    kernels = load_kernels("hrr", (*FLAGS, f"-DLANES={lanes}"))
    monkeypatch.setattr(native, "load_kernels", lambda name: kernels)
    for size in SIZES:
        check(*size, masked=True, bias=True, mask_superposition=False)


@pytest.mark.parametrize("heads", [1, 4])
def test_threads_change_nothing_but_rounding(heads, monkeypatch):
    monkeypatch.setattr(native, "WORK_OF_THREAD", 1)
    before = torch.get_num_threads()
    layer, (x, mask) = build(32, heads, bias=True), draw(32, 700)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(layer, x, mask))
            for _ in range(10):  # which thread takes which tiles differs
                assert all(torch.equal(a, b) for a, b in zip(results[-1], run(layer, x, mask), strict=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_close(b, a, 1e-6)


def test_other_strides():
    layer, (x, mask) = build(32, 4), draw(32, 200)
    strided = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    for a, b in zip(run(layer, strided, mask), run(layer, x, mask), strict=True):
        assert torch.equal(a, b)


def test_equals_torchs_products(monkeypatch):
    """Those of machines without a compiler."""
    layer, (x, mask) = build(32, 4, bias=True), draw(32, 200)
    ours = run(layer, x, mask)
    monkeypatch.setattr(native, "supports", lambda x: False)
    for a, b in zip(ours, run(layer, x, mask), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("place", [(1, 5, 3), (0, 0, 0)])
def test_what_is_no_number_is_not_hidden(place):
    layer, (x, _) = build(32, 4), draw(32, 200)
    x = x.detach()
    x[place] = torch.nan
    out = layer(x)
    assert out[place[0]].isnan().all() and not out[2].isnan().any()
