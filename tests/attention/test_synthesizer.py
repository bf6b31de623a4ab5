"""Synthesizer against its equations."""

import pytest
import torch

from attention import MultiHeadAttention
from tests.mechanisms import make_mask
from tests.tolerance import assert_close


def naive(layer, x, mask, causal):
    """Row by row, head by head."""
    head_dim = layer.dim // layer.num_heads
    num_tokens = x.shape[1]
    rows = []
    for b in range(len(x)):
        heads = []
        for h in range(layer.num_heads):
            value = x[b] @ layer.value.weight[h * head_dim : (h + 1) * head_dim].T
            out = []
            for i in range(num_tokens):
                if layer.variant == "random":
                    scores = layer.scores[h, i, :num_tokens]
                elif layer.variant == "factorized-random":
                    scores = layer.columns[h, :num_tokens] @ layer.rows[h, i]
                else:
                    part = slice(h * head_dim, (h + 1) * head_dim)
                    hidden = (layer.hidden.weight[part] @ x[b, i] + layer.hidden.bias[part]).clamp_min(0)
                    scores = layer.row_weight[h, :num_tokens] @ hidden + layer.row_bias[h, 0, :num_tokens]
                if layer.query is not None:
                    part = slice(h * head_dim, (h + 1) * head_dim)
                    query, keys = layer.query.weight[part] @ x[b, i], x[b] @ layer.key.weight[part].T
                    scores = scores + keys @ query / head_dim**0.5
                seen = torch.ones(num_tokens, dtype=torch.bool) if mask is None else ~mask[b]
                if causal:
                    seen = seen & (torch.arange(num_tokens) <= i)
                mass = scores.exp() * seen
                out.append(mass @ value / mass.sum().clamp_min(1e-300))
            heads.append(torch.stack(out))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows) @ layer.output.weight.T


@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("variant", "dot_product"), [("random", False), ("factorized-random", False), ("dense", False), ("random", True)]
)
def test_equals_its_equation(variant, dot_product, causal, kind):
    torch.manual_seed(0)
    options = {"variant": variant, "causal": causal, "dot_product": dot_product}
    layer = MultiHeadAttention(6, 2, "synthesizer", max_length=9, **options).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    mask = make_mask(kind, 3, 7)
    leaves = [x, *layer.parameters()]
    grad = torch.randn(3, 7, 6, dtype=torch.float64)
    found, expected = layer(x, mask), naive(layer.attention, x, mask, causal)
    assert_close(found, expected)
    for ours, theirs in zip(
        *(
            torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
            for out in (found, expected)
        ),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_the_random_variant_has_one_matrix_for_all_inputs():
    """A token's output is the same mixture of values whatever the tokens are."""
    torch.manual_seed(0)
    layer = MultiHeadAttention(6, 2, "synthesizer", max_length=5)
    x, y = torch.randn(2, 1, 5, 6)
    assert_close(layer(x + y), layer(x) + layer(y))


def test_unknown_variants_raise():
    with pytest.raises(
        ValueError, match="unknown variant 'factorised'; valid ones are random, factorized-random, dense"
    ):
        MultiHeadAttention(6, 2, "synthesizer", max_length=5, variant="factorised")
