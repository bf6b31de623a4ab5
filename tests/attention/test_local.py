"""Local attention against a dense matrix with everything outside the blocks hidden."""

import pytest
import torch

from attention import build_attention, dense_attention, local_attention
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.reference import visible_attention
from tests.tolerance import assert_close


def twin(block_size, neighbors, interleaved, causal):
    """i sees j where their blocks are at most `neighbors` apart."""

    def attend(q, k, v, mask):
        position = torch.arange(q.shape[2])
        num_blocks = q.shape[2] // block_size + 1
        block = position % num_blocks if interleaved else position // block_size
        visible = (block[:, None] - block).abs() <= neighbors
        if causal:
            visible &= position <= position[:, None]
        if mask is not None:
            visible = visible & ~mask[:, None, None]
        return visible_attention(q, k, v, visible)

    return attend


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("neighbors", "interleaved"), [(0, False), (1, False), (2, False), (0, True)])
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 23])
def test_equals_the_dense_twin(num_tokens, neighbors, interleaved, causal, kind):
    options = {"block_size": 4, "neighbors": neighbors, "interleaved": interleaved, "causal": causal}
    assert_equals_twin(
        lambda q, k, v, mask: local_attention(q, k, v, key_padding_mask=mask, **options),
        twin(**options),
        make_qkv(3, 2, num_tokens, 4, 6),
        make_mask(kind, 3, num_tokens),
    )


def test_one_block_is_dense_attention():
    q, k, v = make_qkv(2, 2, 13, 4, 4)
    assert_close(local_attention(q, k, v, block_size=13), dense_attention(q, k, v))
    assert_close(local_attention(q, k, v, block_size=4, neighbors=3), dense_attention(q, k, v))


def test_interleaved_blocks_are_those_of_a_reshape():
    """As the Long Range Arena's code: pad by block - N % block, reshape to (block, n), attend along the first axis."""
    q, k, v = make_qkv(1, 1, 12, 4, 4)
    block_size = 5  # 12 + 3 tokens, n = 3
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 3)).unflatten(2, (block_size, 3)).transpose(2, 3) for x in (q, k, v)]
    real = (torch.arange(15) < 12).view(block_size, 3).T[:, None]  # (3, 1, 5)
    expected = visible_attention(*(x[0, 0][:, None] for x in padded), real[:, None])  # blocks in the place of the batch
    found = local_attention(q, k, v, block_size, interleaved=True)
    assert_close(found[0, 0], expected[:, 0].transpose(0, 1).reshape(15, 4)[:12])


def test_wrong_sizes_raise():
    with pytest.raises(ValueError, match="block_size must be positive"):
        build_attention("local", block_size=0)
    with pytest.raises(ValueError, match="interleaved blocks have no neighbors"):
        build_attention("local", interleaved=True, neighbors=1)
