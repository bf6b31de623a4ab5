"""Linear attention against the N x N matrix of its weights."""

import pytest
import torch

from attention import build_attention, linear_attention
from attention.linear import CAUSAL_BLOCK
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.tolerance import assert_close


def twin(causal):
    """Eq. 5 of the paper with the weights written out: φ(q_i)·φ(k_j), φ(x) = x + 1 above 0, exp(x) below."""

    def feature(x):
        return torch.where(x > 0, x + 1, x.exp())

    def attend(q, k, v, mask):
        weights = feature(q) @ feature(k).transpose(-1, -2)  # (B, H, Nq, Nk)
        if causal:
            weights = weights.tril()
        if mask is not None:
            weights = weights * ~mask[:, None, None]
        return weights @ v / weights.sum(-1, keepdim=True).clamp_min(1e-300)

    return attend


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 13, CAUSAL_BLOCK, 2 * CAUSAL_BLOCK + 5])
def test_equals_the_matrix_of_weights(num_tokens, causal, kind):
    assert_equals_twin(
        lambda q, k, v, mask: linear_attention(q, k, v, mask, causal),
        twin(causal),
        make_qkv(3, 2, num_tokens, 4, 6),
        make_mask(kind, 3, num_tokens),
    )


def test_unequal_lengths():
    q, k, v = make_qkv(2, 2, 12, 4, 6)
    k, v = k[:, :, :5], v[:, :, :5]
    assert_close(linear_attention(q, k, v), twin(False)(q, k, v, None))
    with pytest.raises(ValueError, match="causal attention needs as many keys as queries, not 5 for 12"):
        linear_attention(q, k, v, causal=True)


def test_low_precision_sums_in_float32():
    """65,536 equal keys: their sum is beyond float16, their mean is not."""
    q, k = torch.zeros(1, 1, 1, 4, dtype=torch.float16), torch.full((1, 1, 65536, 4), 2.0, dtype=torch.float16)
    v = torch.ones(1, 1, 65536, 4, dtype=torch.float16)
    out = build_attention("linear")(q, k, v)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones_like(out))
