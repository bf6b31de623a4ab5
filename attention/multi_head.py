"""Multi-head self-attention around any mechanism (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from attention.registry import build_attention, get_mechanism


class MultiHeadAttention(nn.Module):
    """Linear projections to queries, keys and values, attention in every head, and a linear output projection.

    A mechanism that is a whole layer stands in the place of all of this.

    Args:
        dim: channels C, a multiple of `num_heads`.
        attention: name of a registered mechanism.
        bias: whether the projections have one.
        max_length: the most tokens that the layer will see; needed by mechanisms of fixed length, unused by others.
        options: of the mechanism; `dim`, `num_heads` and `head_dim` are filled in where it takes them.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or an unknown mechanism, or what `build_attention` refuses.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: str = "hrr",
        bias: bool = False,
        max_length: int | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got {dim} and {num_heads}")
        self.num_heads = num_heads
        mechanism = get_mechanism(attention)
        known = {"dim": dim, "num_heads": num_heads, "head_dim": dim // num_heads, "bias": bias}
        known["max_length"] = max_length
        filled = {option: value for option, value in known.items() if option in mechanism.options}
        self.is_layer = mechanism.layer
        if not self.is_layer:
            self.query = nn.Linear(dim, dim, bias=bias)
            self.key = nn.Linear(dim, dim, bias=bias)
            self.value = nn.Linear(dim, dim, bias=bias)
            self.output = nn.Linear(dim, dim, bias=bias)
        self.attention = build_attention(attention, **filled | options)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), key_padding_mask bool (B, N), True = ignored -> (B, N, C)."""
        if self.is_layer:
            return self.attention(x, key_padding_mask)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D)
            for projection in (self.query, self.key, self.value)
        )
        tokens = {"tokens": x} if getattr(self.attention, "takes_tokens", False) else {}
        out = self.attention(q, k, v, key_padding_mask, **tokens)  # (B, H, N, D)
        return self.output(out.transpose(1, 2).flatten(2))
