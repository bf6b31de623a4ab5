"""Parameters of the original's JAX networks under our names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

# The first pattern that matches a path, without its leaf, gives our name for it.
_MODULES = (
    (r"cls_token", "cls_token"),
    (r"(?:Encoder_0/)?Embedding(?:Fixed|Learned)?_0/Embed_0", "token_embedding"),
    (r"(?:Encoder_0/)?Embedding(?:Fixed|Learned)?_0/Embed_1", "position_embedding"),
    (r"Dense_0", "readout.hidden"),
    (r"Dense_1", "readout.output"),
    # Malware: an Encoder_i is a layer.
    (r"Encoder_(\d+)/MHAttention_0/Dense_0", r"layers.\1.attention.query"),
    (r"Encoder_(\d+)/MHAttention_0/Dense_1", r"layers.\1.attention.key"),
    (r"Encoder_(\d+)/MHAttention_0/Dense_2", r"layers.\1.attention.value"),
    (r"Encoder_(\d+)/MHAttention_0/Dense_3", r"layers.\1.attention.output"),
    (r"Encoder_(\d+)/FeedForwardLayer_0/Dense_0", r"layers.\1.mlp.hidden"),
    (r"Encoder_(\d+)/FeedForwardLayer_0/Dense_1", r"layers.\1.mlp.output"),
    # All others: Encoder_0 holds the layers, or the network itself does.
    (r"(?:Encoder_0/)?EncoderLayer_(\d+)/SelfAttention_0/(\w+)", r"layers.\1.attention.\2"),
    (r"(?:Encoder_0/)?EncoderLayer_(\d+)/MLP_0/Dense_0", r"layers.\1.mlp.hidden"),
    (r"(?:Encoder_0/)?EncoderLayer_(\d+)/MLP_0/Dense_1", r"layers.\1.mlp.output"),
)
_LAYER_NORM = re.compile(r"((?:Encoder_0/)?EncoderLayer_(\d+)|Encoder_(\d+))/LayerNorm_(\d)")
_EMBEDDING_NORM = re.compile(r"(?:Encoder_0/)?LayerNorm_0")
_LEAVES = {"kernel": ".weight", "embedding": ".weight", "scale": ".weight", "bias": ".bias", "": ""}


def from_flax(parameters: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """{flax path: array} as {our name: float32 tensor}; kernels (in, out) become weights (out, in).

    Raises:
        ValueError: a path that no network of the original has.
    """
    paths = parameters.keys()
    return {our_name(path, paths): _tensor(path, array) for path, array in parameters.items()}


def our_name(path: str, paths: Iterable[str]) -> str:
    """Our name of the parameter at `path` of a network that has all `paths`; raises as `from_flax`."""
    module, _, leaf = path.rpartition("/")
    if not module:
        module, leaf = leaf, ""
    if leaf in _LEAVES:
        name = _norm_name(module, paths)
        for pattern, replacement in _MODULES:
            match = re.fullmatch(pattern, module)
            if match and name is None:
                name = match.expand(replacement)
        if name is not None:
            return name + _LEAVES[leaf]
    raise ValueError(f"no network of the original has a parameter {path!r}")


def _norm_name(module: str, paths: Iterable[str]) -> str | None:
    malware = any("/MHAttention_" in path for path in paths)
    match = _LAYER_NORM.fullmatch(module)
    if match and (malware or match[2] is not None):
        # A layer with one norm has it before the MLP.
        only = not any(path.startswith(f"{match[1]}/LayerNorm_1/") for path in paths)
        return f"layers.{match[2] or match[3]}.{'mlp_norm' if only or match[4] == '1' else 'attention_norm'}"
    return "embedding_norm" if _EMBEDDING_NORM.fullmatch(module) else None


def _tensor(path: str, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.asarray(array, dtype=np.float32))
    return tensor.T.contiguous() if path.endswith("/kernel") else tensor
