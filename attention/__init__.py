"""Attention mechanisms behind one interface. Imports torch and nothing else."""

from attention.bigbird import BigBirdAttention, bigbird_attention
from attention.dense import DenseAttention, dense_attention
from attention.fnet import FNetMixing, fourier_mixing
from attention.h_transformer_1d import HTransformer1DAttention, h_transformer_1d_attention
from attention.hrr import HRRAttention, HRRSelfAttention, hrr_attention
from attention.linear import LinearAttention, linear_attention
from attention.linformer import LinformerAttention, linformer_attention
from attention.local import LocalAttention, local_attention
from attention.longformer import LongformerAttention, longformer_attention
from attention.luna import LunaAttention
from attention.multi_head import MultiHeadAttention
from attention.nystromformer import NystromAttention, nystrom_attention
from attention.performer import PerformerAttention, performer_attention
from attention.reformer import ReformerAttention, reformer_attention
from attention.registry import available_attention, build_attention, get_mechanism
from attention.sinkhorn import SinkhornAttention, sinkhorn_attention
from attention.smyrf import SmyrfAttention, clustered_attention, smyrf_attention
from attention.sparse import SparseAttention, sparse_attention
from attention.spatial import SpatialAttention
from attention.synthesizer import SynthesizerAttention

__all__ = [
    "BigBirdAttention",
    "DenseAttention",
    "FNetMixing",
    "HRRAttention",
    "HRRSelfAttention",
    "HTransformer1DAttention",
    "LinearAttention",
    "LinformerAttention",
    "LocalAttention",
    "LongformerAttention",
    "LunaAttention",
    "MultiHeadAttention",
    "NystromAttention",
    "PerformerAttention",
    "ReformerAttention",
    "SinkhornAttention",
    "SmyrfAttention",
    "SparseAttention",
    "SpatialAttention",
    "SynthesizerAttention",
    "available_attention",
    "bigbird_attention",
    "build_attention",
    "clustered_attention",
    "dense_attention",
    "fourier_mixing",
    "get_mechanism",
    "h_transformer_1d_attention",
    "hrr_attention",
    "linear_attention",
    "linformer_attention",
    "local_attention",
    "longformer_attention",
    "nystrom_attention",
    "performer_attention",
    "reformer_attention",
    "sinkhorn_attention",
    "smyrf_attention",
    "sparse_attention",
]
