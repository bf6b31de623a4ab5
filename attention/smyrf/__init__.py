"""SMYRF: attention inside balanced clusters of hashed queries and keys (Daras et al. 2020, arXiv:2010.05315)."""

from attention.smyrf.clusters import cluster_orders, resolve_cluster_sizes
from attention.smyrf.functional import clustered_attention, smyrf_attention
from attention.smyrf.module import SmyrfAttention

__all__ = ["SmyrfAttention", "cluster_orders", "clustered_attention", "resolve_cluster_sizes", "smyrf_attention"]
