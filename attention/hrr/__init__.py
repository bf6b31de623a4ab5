"""HRR attention: holographic reduced representations in place of dot products (Alam et al. 2023, arXiv:2305.19534)."""

from attention.hrr.attention import HRRAttention, hrr_attention
from attention.hrr.layer import HRRSelfAttention
from attention.hrr.ops import bind, inverse, unbind

__all__ = ["HRRAttention", "HRRSelfAttention", "bind", "hrr_attention", "inverse", "unbind"]
