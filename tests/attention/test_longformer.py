"""Longformer attention against a dense matrix with the window and the global tokens written out."""

import pytest
import torch

from attention import MultiHeadAttention, build_attention, dense_attention, longformer_attention
from tests.mechanisms import assert_equals_twin, make_mask, make_qkv
from tests.reference import visible_attention
from tests.tolerance import TOLERANCE, assert_close


def visible_pairs(num_tokens, window, num_global, symmetric=True, causal=False):
    """bool (N, N): |i - j| <= w/2 (not symmetric: i - j < w/2), or either is global; causal: j <= i."""
    i, j = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
    left = window // 2 if symmetric else (window - 1) // 2
    visible = (i - j <= left) & (j - i <= window // 2) | (i < num_global) | (j < num_global)
    return visible & (j <= i) if causal else visible


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "num_global", "symmetric"), [(4, 0, True), (6, 1, True), (4, 3, False)])
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 23])
def test_equals_the_dense_twin(num_tokens, window, num_global, symmetric, causal, kind):
    options = {"window": window, "num_global": num_global, "symmetric": symmetric, "causal": causal}

    def twin(q, k, v, mask):
        visible = visible_pairs(num_tokens, **options)
        return visible_attention(q, k, v, visible if mask is None else visible & ~mask[:, None, None])

    assert_equals_twin(
        lambda q, k, v, mask: longformer_attention(q, k, v, key_padding_mask=mask, **options),
        twin,
        make_qkv(3, 2, num_tokens, 4, 6),
        make_mask(kind, 3, num_tokens),
    )


def test_a_wide_window_is_dense_attention():
    q, k, v = make_qkv(2, 2, 13, 4, 4)
    assert_close(longformer_attention(q, k, v, window=26), dense_attention(q, k, v))


def test_the_arena_window_holds_as_many_keys_as_it_says():
    assert visible_pairs(32, 6, 0, symmetric=False)[16].sum() == 6
    assert visible_pairs(32, 6, 0)[16].sum() == 7


@pytest.mark.parametrize("causal", [False, True])
def test_global_projections_are_the_global_tokens_own(causal):
    """Tokens outside see nothing of them; the global ones are dense attention with the other projections."""
    torch.manual_seed(0)
    options = {"window": 4, "num_global": 2, "causal": causal}
    layer = MultiHeadAttention(8, 2, "longformer", bias=True, global_projections=True, **options).double()
    shared = MultiHeadAttention(8, 2, "longformer", bias=True, **options).double()
    shared.load_state_dict({name: x for name, x in layer.state_dict().items() if "global" not in name})
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    mask = make_mask("padding", 2, 11)
    out = layer(x, mask)
    assert_close(out[:, 2:], shared(x, mask)[:, 2:])
    own = layer.attention
    maps = (own.global_query, own.global_key, own.global_value)
    q, k, v = (linear(x).unflatten(-1, (2, 4)).transpose(1, 2) for linear in maps)
    dense = dense_attention(q, k, v, key_padding_mask=mask, causal=causal).transpose(1, 2).flatten(2)
    assert_close(out[:, :2], layer.output(dense)[:, :2])
    assert (out[:, :2] - shared(x, mask)[:, :2]).abs().max() > 1e-3


def test_wrong_use_raises():
    with pytest.raises(ValueError, match="window must be at least 2"):
        build_attention("longformer", window=1)
    with pytest.raises(ValueError, match="global_projections need dim"):
        build_attention("longformer", global_projections=True)
    with pytest.raises(ValueError, match="tokens are needed"):
        build_attention("longformer", global_projections=True, dim=8)(*make_qkv(1, 2, 5, 4, 4))


def test_equals_transformers_with_the_same_weights():
    """The layer of Hugging Face's Longformer, which wants its mask as numbers and lengths that the window divides."""
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = longformer.LongformerConfig(
        attention_window=[8], hidden_size=16, num_attention_heads=2, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    theirs = longformer.LongformerSelfAttention(config, layer_id=0).double().eval()
    ours = MultiHeadAttention(16, 2, "longformer", bias=True, window=8, num_global=2, global_projections=True).double()
    names = ("query", "key", "value")
    weights = {f"{name}.": getattr(theirs, name) for name in names}
    weights |= {f"attention.global_{name}.": getattr(theirs, f"{name}_global") for name in names}
    state = {prefix + name: x for prefix, module in weights.items() for name, x in module.state_dict().items()}
    ours.load_state_dict(state | {"output.weight": torch.eye(16), "output.bias": torch.zeros(16)})
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    mask = make_mask("padding", 2, 24)
    is_global = torch.arange(24).expand(2, -1) < 2
    numbers = torch.zeros(2, 24, dtype=torch.float64).masked_fill(is_global, 10000.0).masked_fill(mask, -10000.0)
    expected = theirs(
        x,
        attention_mask=numbers,
        is_index_masked=mask,
        is_index_global_attn=is_global,
        is_global_attn=True,
    )[0]
    hidden = mask[..., None]
    # Theirs takes the softmax in float32.
    assert_close(ours(x, mask).masked_fill(hidden, 0.0), expected.masked_fill(hidden, 0.0), TOLERANCE[torch.float32])
