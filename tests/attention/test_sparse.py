"""Sparse Transformer attention against a dense matrix with both patterns written out."""

import pytest
import torch

from attention import build_attention, dense_attention, sparse_attention
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.reference import visible_attention
from tests.tolerance import assert_close

STRIDE = 4


def near_and_far(num_tokens, pattern, num_summaries, causal, lra=False):
    """The two patterns, bool (N, N) each, as section 4.3 has them; `lra` adds the first column of every block."""
    i, j = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
    if pattern == "strided":
        near, far = (i - j).abs() <= STRIDE, (i - j) % STRIDE == 0
    else:
        near, far = i // STRIDE == j // STRIDE, (j % STRIDE >= STRIDE - num_summaries).expand(num_tokens, -1)
        far = far | (j % STRIDE == 0) if lra else far
    return (near & (j <= i), far & (j <= i)) if causal else (near, far)


CASES = [("fixed", 1, "merged"), ("fixed", 2, "split"), ("strided", 1, "merged"), ("strided", 1, "split")]


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("pattern", "num_summaries", "heads"), CASES)
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 23])
def test_equals_the_dense_twin(num_tokens, pattern, num_summaries, heads, causal, kind):
    options = {"pattern": pattern, "num_summaries": num_summaries, "heads": heads, "causal": causal}

    def twin(q, k, v, mask):
        near, far = near_and_far(num_tokens, pattern, num_summaries, causal)
        visible = torch.stack([near, far, far]) if heads == "split" else near | far  # 3 heads: 1 near, 2 far
        return visible_attention(q, k, v, visible if mask is None else visible & ~mask[:, None, None])

    assert_equals_twin(
        lambda q, k, v, mask: sparse_attention(q, k, v, STRIDE, key_padding_mask=mask, **options),
        twin,
        make_qkv(3, 3, num_tokens, 4, 6),
        make_mask(kind, 3, num_tokens),
    )


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 23])
def test_the_arena_reading_equals_its_twin(num_tokens, causal, kind):
    """The pattern holds among the tokens after the first, which sees all and is seen by all."""

    def twin(q, k, v, mask):
        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        near, far = near_and_far(num_tokens - 1, "fixed", 2, causal, lra=True)
        visible[1:, 1:] = near | far
        return visible_attention(q, k, v, visible if mask is None else visible & ~mask[:, None, None])

    options = {"num_summaries": 2, "lra": True, "causal": causal}
    assert_equals_twin(
        lambda q, k, v, mask: sparse_attention(q, k, v, STRIDE, key_padding_mask=mask, **options),
        twin,
        make_qkv(3, 2, num_tokens, 4, 4),
        make_mask(kind, 3, num_tokens),
    )


@pytest.mark.parametrize("pattern", ["fixed", "strided"])
def test_a_stride_as_long_as_the_sequence_is_dense_attention(pattern):
    q, k, v = make_qkv(2, 2, 13, 4, 4)
    assert_close(sparse_attention(q, k, v, 13, pattern, num_summaries=3), dense_attention(q, k, v))


def test_wrong_options_raise():
    with pytest.raises(ValueError, match="'fix'.*fixed, strided"):
        build_attention("sparse", pattern="fix")
    with pytest.raises(ValueError, match="'alternating'.*merged, split"):
        build_attention("sparse", heads="alternating")
    with pytest.raises(ValueError, match="num_summaries < stride"):
        build_attention("sparse", stride=32, num_summaries=32)
    with pytest.raises(ValueError, match="fixed pattern with merged heads"):
        build_attention("sparse", pattern="strided", lra=True)
    with pytest.raises(ValueError, match="two heads"):
        build_attention("sparse", heads="split")(*make_qkv(1, 1, 8, 4, 4))
