"""Attention mechanisms behind one interface: dense, SMYRF and HRR. Imports torch and nothing else."""

from attention.dense import DenseAttention, dense_attention
from attention.hrr import HRRAttention, HRRSelfAttention, hrr_attention
from attention.multi_head import MultiHeadAttention
from attention.registry import available_attention, build_attention, get_mechanism
from attention.smyrf import SmyrfAttention, clustered_attention, smyrf_attention
from attention.spatial import SpatialAttention

__all__ = [
    "DenseAttention",
    "HRRAttention",
    "HRRSelfAttention",
    "MultiHeadAttention",
    "SmyrfAttention",
    "SpatialAttention",
    "available_attention",
    "build_attention",
    "clustered_attention",
    "dense_attention",
    "get_mechanism",
    "hrr_attention",
    "smyrf_attention",
]
