"""HRR operations and attention against loops in float64 and Fourier transforms."""

import pytest
import torch

from attention import HRRAttention, HRRSelfAttention, MultiHeadAttention, hrr_attention
from attention.hrr import bind, inverse, unbind
from attention.hrr.naive import bind_fft, bind_loop, naive_hrr_attention, unbind_fft, unbind_loop
from tests.tolerance import assert_close, assert_no_worse

DIMS = [1, 2, 7, 15, 16]
BACKENDS = ["plain", "chunked"]


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("ours, loop, fft", [(bind, bind_loop, bind_fft), (unbind, unbind_loop, unbind_fft)])
def test_operations_equal_loops_and_transforms(dim, ours, loop, fft):
    x, y, _ = inputs((3, 4, dim))
    assert_close(ours(x, y), loop(x, y))
    assert_close(ours(x, y), fft(x, y))
    x, y, _ = inputs((1, 2, dim), torch.float64)
    assert torch.autograd.gradcheck(ours, (x, y))


@pytest.mark.parametrize("dim", DIMS)
def test_algebra(dim):
    """Binding commutes and associates, the delta is its identity, the inverse is an involution that unbinds."""
    x, y, z = inputs((5, dim), torch.float64)
    delta = torch.zeros(dim, dtype=torch.float64)
    delta[0] = 1.0
    assert_close(bind(x, y), bind(y, x))
    assert_close(bind(bind(x, y), z), bind(x, bind(y, z)))
    assert_close(bind(x, delta), x)
    assert torch.equal(inverse(inverse(x)), x)
    assert_close(unbind(z, x), bind(inverse(x), z))


def test_unbinding_recovers_what_was_bound():
    """Plate 1995: for N(0, 1/d) vectors the noise of unbinding is of the size of the signal, and uncorrelated."""
    torch.manual_seed(0)
    x, y, other = torch.randn(3, 200, 256) / 16
    recovered = unbind(bind(x, y), x)
    assert torch.cosine_similarity(recovered, y, dim=-1).mean() > 0.6
    assert torch.cosine_similarity(recovered, other, dim=-1).mean().abs() < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operations", [(bind_loop, unbind_loop), (bind_fft, unbind_fft)])
@pytest.mark.parametrize("shape", [(2, 3, 17, 8), (1, 2, 5, 15), (2, 1, 9, 1), (1, 1, 1, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_fast_forms_equal_the_naive_twin(shape, masked, operations, backend):
    leaves = inputs(shape)
    mask = None
    if masked:
        mask = torch.rand(shape[0], shape[2]) < 0.5
        mask[:, 0] = False
    out, weights = hrr_attention(*leaves, mask, return_weights=True, backend=backend)
    truth, true_weights = naive_hrr_attention(*leaves, mask, *operations)
    assert_close(out, truth)
    assert_close(weights, true_weights)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, truth)), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * max(leaf.abs().max() for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """Of outputs and weights; a row whose tokens are all masked included."""
    leaves = inputs((2, 2, 5, 3), torch.float64)
    mask = torch.tensor([[False, True, False, False, True], [True] * 5])
    for options in ({}, {"key_padding_mask": mask}):
        assert torch.autograd.gradcheck(
            lambda *x, options=options: hrr_attention(*x, **options, return_weights=True, backend=backend), leaves
        )


def test_plain_expression_is_twice_differentiable():
    leaves = inputs((1, 1, 4, 3), torch.float64)
    assert torch.autograd.gradgradcheck(lambda *x: hrr_attention(*x, backend="plain"), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_rounding_everywhere(dtype, backend):
    """Plain: the same products with every intermediate rounded to the low precision."""
    low = inputs((2, 2, 33, 8), dtype)
    q, k, v = low
    bound = bind(k, v).sum(dim=2, keepdim=True)
    retrieved = unbind(bound, q)
    plain = torch.softmax(torch.cosine_similarity(v, retrieved, dim=-1), dim=-1)[..., None] * v
    truth = naive_hrr_attention(*(x.double() for x in low))[0]
    out = hrr_attention(*low, backend=backend)
    assert_no_worse(out, plain, truth)
    grads, true_grads = (torch.autograd.grad(x.square().sum(), low) for x in (out, truth))
    with torch.autocast("cpu", dtype):
        cast = hrr_attention(*low, backend=backend)
    assert torch.equal(cast, out)
    assert all(map(torch.equal, torch.autograd.grad(cast.square().sum(), low), grads))
    for ours, theirs in zip(grads, true_grads, strict=True):
        assert_close(ours.float(), theirs, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend):
    q, k, v = inputs((2, 2, 12, 6))
    mask = torch.arange(12) >= torch.tensor([[12], [7]])
    out, weights = hrr_attention(q, k, v, mask, return_weights=True, backend=backend)
    assert_close(out[1:, :, :7], hrr_attention(*(x[1:, :, :7] for x in (q, k, v)), backend=backend))
    assert (out[1, :, 7:] == 0).all() and (weights[1, :, 7:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_tokens_may_enter_the_superposition(dtype, backend):
    """The original's treatment: other weights, and uniform ones where every token is masked."""
    q, k, v = inputs((2, 1, 8, 4), dtype)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 5:] = True
    mask[1] = True
    _, ours = hrr_attention(q, k, v, mask, return_weights=True, backend=backend)
    _, original = hrr_attention(q, k, v, mask, return_weights=True, mask_superposition=False, backend=backend)
    assert not torch.allclose(ours[0], original[0]) and (original[0, :, 5:] == 0).all()
    assert (ours[1] == 0).all() and torch.equal(original[1], torch.full((1, 8), 1 / 8, dtype=dtype))
    module = HRRAttention(mask_superposition=False, backend=backend)
    assert torch.equal(module(q, k, v, mask), original[..., None] * v)


def test_weights_lie_in_the_documented_range():
    _, weights = hrr_attention(*inputs((2, 3, 50, 8)), return_weights=True)
    bounds = torch.tensor([-2.0, 2.0]).exp() / 50
    assert weights.min() >= bounds[0] and weights.max() <= bounds[1]
    assert_close(weights.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6, 1e6])
def test_any_scale_is_finite(scale, backend):
    leaves = [(x * scale).detach().requires_grad_() for x in inputs((1, 2, 9, 8))]
    out = hrr_attention(*leaves, backend=backend)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_have_cosine_zero_and_pass_on_no_gradient_of_it(backend):
    q, k, v = (x.detach() for x in inputs((1, 1, 6, 4)))
    q[..., 1, :] = 0.0
    v[..., 2, :] = 0.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, weights = hrr_attention(*leaves, return_weights=True, backend=backend)
    assert_close(weights[..., 1] / weights[..., 2], torch.ones(1, 1))
    grad_q, _, grad_v = torch.autograd.grad(weights.square().sum(), leaves)
    assert (grad_q[..., 1, :] == 0).all() and (grad_v[..., 2, :].abs() < 1).all()
    assert (grad_q[..., 0, :] != 0).any()


def test_cosines_do_not_depend_on_the_scale():
    q, k, v = inputs((1, 2, 9, 8))
    weights = hrr_attention(q, k, v, return_weights=True)[1]
    assert_close(hrr_attention(1e-4 * q, 1e-4 * k, 1e-4 * v, return_weights=True)[1], weights)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="plain, chunked, triton"):
        HRRAttention(backend="fft")
    with pytest.raises(ValueError, match="CUDA"):
        hrr_attention(*inputs((1, 1, 2, 4)), backend="triton")
    with pytest.raises(ValueError, match="plain, chunked, triton"):
        hrr_attention(*inputs((1, 1, 2, 4)), backend="fast")


def test_layer_has_the_parameters_of_multi_head_attention():
    torch.manual_seed(0)
    layer, general = HRRSelfAttention(12, 3), MultiHeadAttention(12, 3, "hrr")
    general.load_state_dict(layer.state_dict())
    x, mask = torch.randn(2, 7, 12), torch.rand(2, 7) < 0.5
    assert torch.equal(layer(x, mask), general(x, mask))
    assert sum(p.numel() for p in HRRSelfAttention(12, 3, bias=True).parameters()) == 4 * (144 + 12)
