"""The folded HRR layer against the projections around the plain expression."""

import pytest
import torch

from attention import HRRSelfAttention, MultiHeadAttention
from attention.hrr import chunked, native, operators
from tests.tolerance import assert_close

DIM, HEADS, TOKENS = 10, 2, 43


def layers(dtype=torch.float64, **options):
    """A layer that folds, and one that does not, with the same weights."""
    torch.manual_seed(0)
    folded = HRRSelfAttention(DIM, HEADS, **options).to(dtype)
    plain = HRRSelfAttention(DIM, HEADS, **options | {"backend": "plain"}).to(dtype)
    plain.load_state_dict(folded.state_dict())
    return folded, plain


def tokens(dtype=torch.float64, count=TOKENS):
    torch.manual_seed(1)
    x = torch.randn(3, count, DIM, dtype=dtype).requires_grad_()
    mask = torch.rand(3, count) < 0.4
    mask[-1] = True  # every token of the last row
    return x, mask


def run(layer, x, mask):
    """Output and the gradients of x and of every parameter."""
    out = layer(x, mask)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    return out, *torch.autograd.grad(out, [x, *layer.parameters()], direction)


def is_folded(out):
    return "hrr_layer" in (out.grad_fn.name() + "".join(f.name() for f, _ in out.grad_fn.next_functions if f))


@pytest.mark.parametrize("chunk", [1, 40, 1 << 19])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mask_superposition", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_autograd_through_the_plain_expression(chunk, bias, masked, mask_superposition, recompute, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    folded, plain = layers(bias=bias, mask_superposition=mask_superposition, recompute=recompute)
    x, mask = tokens()
    mask = mask if masked else None
    ours = run(folded, x, mask)
    assert is_folded(ours[0])
    for a, b in zip(ours, run(plain, x, mask), strict=True):
        assert_close(a, b)


def test_equals_multi_head_attention_in_float32():
    folded = HRRSelfAttention(96, 3)  # G in two blocks
    general = MultiHeadAttention(96, 3, "hrr")
    general.load_state_dict(folded.state_dict())
    x = torch.randn(2, 400, 96, requires_grad=True)
    for a, b in zip(run(folded, x, None), run(general, x, None), strict=True):
        assert_close(a, b)


def test_gradcheck():
    folded, _ = layers(bias=True)
    x, mask = tokens()
    assert torch.autograd.gradcheck(lambda x, *_: folded(x, mask), (x, *folded.parameters()), fast_mode=True)


def test_padding_changes_nothing():
    folded, _ = layers()
    x, mask = tokens(count=60)
    mask[:] = torch.arange(60) >= 45
    out = folded(x, mask)
    assert_close(out[:, :45], folded(x[:, :45]))
    assert (out[:, 45:] == 0).all()


def test_zeros_are_finite():
    folded, _ = layers(torch.float32)
    x = torch.zeros(1, TOKENS, DIM, requires_grad=True)
    assert all(y.isfinite().all() for y in run(folded, x, None))


def test_keeps_its_input_alone():
    """Besides x and the weights of the projections: a weight for each token and head, and a C x C matrix."""
    sizes = {}
    for recompute in (True, False):
        folded, _ = layers(recompute=recompute)
        x, _ = tokens(count=2000)
        kept = {}

        def remember(y, kept=kept):
            kept[y.data_ptr()] = y.numel()
            return y

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda y: y):
            folded(x)
        sizes[recompute] = sum(kept.values())
    small = 4 * DIM**2 + 3 * (DIM**2 + 2000 * HEADS)
    assert sizes[True] == x.numel() + small and sizes[False] == 3 * x.numel() + small


def test_folds_where_that_pays_only():
    x, _ = tokens(torch.float32)
    assert is_folded(layers(torch.float32)[0](x))
    for length, folds in ((3 * DIM // 2 - 1, False), (3 * DIM // 2, native.supports(x)), (4 * DIM, True)):
        assert is_folded(layers(torch.float32)[0](x[:, :length])) == folds
    assert not is_folded(layers(torch.float32, backend="chunked")[0](x)), "a backend by name"
    assert not is_folded(layers(torch.bfloat16)[0](x.bfloat16())), "half precision"
    with torch.autocast("cpu", torch.bfloat16):
        out = layers(torch.float32)[0](x)
        assert out.dtype is torch.bfloat16 and not is_folded(out)


def test_refuses_other_widths():
    with pytest.raises(ValueError, match=r"\(B, N, 10\)"):
        layers()[0](torch.randn(1, 50, 9))


@pytest.mark.parametrize("recompute, masked", [(False, False), (True, True)])
def test_operator_is_well_formed(recompute, masked):
    x, mask = tokens()
    weights = [torch.randn(DIM, columns, dtype=x.dtype, requires_grad=True) for columns in [DIM + 1] * 3 + [DIM]]
    torch.library.opcheck(operators.layer, (x, *weights, mask if masked else None, HEADS, True, recompute))


def test_compiles_without_graph_breaks():
    folded, _ = layers(bias=True)
    x, mask = tokens()
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, mask), run(folded, x, mask), strict=True):
        assert_close(a, b)
