"""BigBird attention against a dense matrix with its graph written out, and the graph against what it promises."""

import pytest
import torch

from attention import MultiHeadAttention, bigbird_attention, build_attention, dense_attention
from attention.bigbird import key_blocks, random_integers
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.reference import visible_attention
from tests.tolerance import assert_close


def visible_pairs(num_tokens, last, heads, block_size, num_random, random_span=None, seed=0):
    """bool (H, N, N) from the graph of one row whose last real block is `last`."""
    num_blocks = -(-num_tokens // block_size)
    keys, seen = key_blocks(torch.tensor([last]), heads, num_blocks, block_size, num_random, random_span, seed)
    graph = torch.zeros(heads, num_blocks, num_blocks, dtype=torch.bool)
    for head in range(heads):
        for block in range(num_blocks):
            graph[head, block, keys[0, head, block][seen[0, head, block]]] = True
    graph[:, [0, last]] = True
    block = torch.arange(num_tokens) // block_size
    return graph[:, block[:, None], block]


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize(("num_random", "random_span"), [(0, None), (1, None), (3, None), (2, 8)])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 16, 23])
def test_equals_the_dense_twin(num_tokens, num_random, random_span, kind):
    options = {"block_size": 2, "num_random": num_random, "random_span": random_span, "seed": 3}

    def twin(q, k, v, mask):
        rows = torch.zeros(q.shape[0], num_tokens, dtype=torch.bool) if mask is None else mask
        lasts = [max((~row).nonzero().flatten().tolist(), default=0) // 2 for row in rows]
        visible = torch.stack([visible_pairs(num_tokens, last, q.shape[1], **options) for last in lasts])
        return visible_attention(q, k, v, visible & ~rows[:, None, None])

    assert_equals_twin(
        lambda q, k, v, mask: bigbird_attention(q, k, v, key_padding_mask=mask, **options),
        twin,
        make_qkv(3, 2, num_tokens, 4, 6),
        make_mask(kind, 3, num_tokens),
    )


def test_few_blocks_are_dense_attention():
    q, k, v = make_qkv(2, 2, 13, 4, 4)
    assert_close(bigbird_attention(q, k, v, block_size=3, num_random=3), dense_attention(q, k, v))


def test_every_block_is_seen_once():
    """No block of keys twice, the window and the ends always, and as many random ones as there are left."""
    last = torch.tensor([0, 1, 4, 10, 19])
    keys, seen = key_blocks(last, heads=3, num_blocks=20, block_size=4, num_random=3, random_span=None, seed=5)
    for row, end in enumerate(last.tolist()):
        for head in range(3):
            for block in range(end + 1):
                found = keys[row, head, block][seen[row, head, block]].tolist()
                certain = {0, end} | {j for j in (block - 1, block, block + 1) if 0 <= j <= end}
                assert len(set(found)) == len(found) and certain <= set(found) <= set(range(end + 1))
                assert len(found) == min(len(certain) + 3, end + 1)


def test_random_blocks_keep_to_their_span_and_differ():
    last = torch.tensor([63])
    keys, seen = key_blocks(last, 4, 64, 2, num_random=3, random_span=32, seed=0)
    drawn = keys[..., 5:]
    assert seen[..., 5:].all() and drawn.max() < 16
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    other = key_blocks(last, 4, 64, 2, num_random=3, random_span=32, seed=1)[0][..., 5:]
    assert not torch.equal(drawn, other)


def test_random_integers_are_uniform_and_do_not_depend_on_the_length():
    draws = random_integers(7, 8, 256, 4, torch.device("cpu"))
    assert torch.equal(draws[:, :100], random_integers(7, 8, 100, 4, torch.device("cpu")))
    counts = torch.bincount(draws.flatten() % 16, minlength=16)  # 8,192 draws, 512 expected with deviation 22
    assert (counts - 512).abs().max() < 100


def test_wrong_sizes_raise():
    with pytest.raises(ValueError, match="block_size must be positive"):
        build_attention("bigbird", block_size=0)
    with pytest.raises(ValueError, match="random_span must hold a block of 64"):
        build_attention("bigbird", random_span=32)


def test_equals_transformers_with_the_same_weights_and_graph():
    """The layer of Hugging Face's BigBird, given our random blocks."""
    bigbird = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    num_blocks, block_size, num_random = 12, 4, 2
    config = bigbird.BigBirdConfig(
        block_size=block_size, num_random_blocks=num_random, hidden_size=16, num_attention_heads=2
    )
    torch.manual_seed(0)
    theirs = bigbird.BigBirdBlockSparseAttention(config).double().eval()
    keys, seen = key_blocks(torch.tensor([num_blocks - 1]), 2, num_blocks, block_size, num_random, None, seed=0)
    assert seen[0, :, 1:-1, 5:].all()
    theirs._bigbird_block_rand_mask_with_head = lambda **_: list(keys[0, :, 1:-1, 5:].numpy())
    ours = MultiHeadAttention(16, 2, "bigbird", bias=True, block_size=block_size, num_random=num_random).double()
    state = {
        f"{name}.{x}": y for name in ("query", "key", "value") for x, y in getattr(theirs, name).state_dict().items()
    }
    ours.load_state_dict(state | {"output.weight": torch.eye(16), "output.bias": torch.zeros(16)})
    x = torch.randn(2, num_blocks * block_size, 16, dtype=torch.float64)
    mask = torch.rand(2, num_blocks * block_size) < 0.3
    mask[:, -4:] = torch.tensor([False, False, True, True])
    blocked, band, from_mask, to_mask = bigbird.BigBirdModel.create_masks_for_block_sparse_attn(
        (~mask).double(), block_size
    )
    expected = theirs(x, band, from_mask, to_mask, blocked, blocked)[0]
    hidden = mask[..., None]
    # Theirs hides a key by subtracting 10,000 from its score.
    assert_close(ours(x, mask).masked_fill(hidden, 0.0), expected.masked_fill(hidden, 0.0))
