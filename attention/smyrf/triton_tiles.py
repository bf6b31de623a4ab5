"""What the Triton kernels share: tiles of gathered rows, and the choice of block sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH of base (·, DIM) at the rows, int64 (M,) -> (M, WIDTH), zeros beyond DIM."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * DIM + columns[None, :]
    return tl.load(pointers) if FIRST + WIDTH <= DIM else tl.load(pointers, mask=columns[None, :] < DIM, other=0.0)


@triton.jit
def store_rows(base, rows, real, x, DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Writes x (M, WIDTH) where `load_rows` would read it, at the rows that are real (M,), in the dtype of base."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * DIM + columns[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=real[:, None] & (columns[None, :] < DIM))


LARGEST_BLOCK = 128
INTERPRETED = not isinstance(load_rows, triton.JITFunction)


def autotune(configs: list[triton.Config], key: list[str]) -> Callable:
    """Triton's autotuner over `configs`, fitted to the arguments; the interpreter takes the smallest blocks."""
    if INTERPRETED:
        configs = [triton.Config({name: 16 for name in configs[0].kwargs})]
    return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": _fit})


def padded_dim(dim: int) -> int:
    """The next power of two, at least what tl.dot takes."""
    return max(16, 1 << (dim - 1).bit_length())


def is_whole(cluster_size: int) -> bool:
    """Whether every block that `autotune` may choose divides clusters of this size."""
    return cluster_size % min(LARGEST_BLOCK, padded_dim(cluster_size)) == 0


def value_widths(dim: int) -> tuple[int, int]:
    """Two tiles of columns, the second possibly of none, that hold `dim` columns with less padding than one would.

    Tiles are powers of two: 96 = 64 + 32 and 48 = 32 + 16 fit without any, and save a quarter of the products.
    """
    width = padded_dim(dim)
    return (width // 2, width // 4) if width >= 64 and dim <= width * 3 // 4 else (width, 0)


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 in full, unless torch's matrix products may round it to TF32 as well."""
    may_round = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if may_round else "ieee"


def ids_of_earlier_rounds(ids: Tensor | None, order: Tensor, this_round: int) -> Tensor | None:
    """Clusters, in every round before this one, of the tokens in this round's order; None where ids are.

    ids int32 (R, B, H, N), order int64 (R, B, H, N) -> int32 (this_round, B, H, N).
    """
    if ids is None:
        return None
    return ids[:this_round].gather(-1, order[this_round].expand(this_round, *order.shape[1:]))


def _fit(configs: list[triton.Config], arguments: dict, **options: object) -> list[triton.Config]:
    """Blocks no larger than clusters, and smaller for float32, whose rows and products take more room."""
    arguments = arguments | options
    sizes = {"BLOCK_Q": arguments["q_size"], "BLOCK_K": arguments["k_size"]}
    shares = {"BLOCK_Q": 1, "BLOCK_K": 1}
    if arguments["q"].dtype is torch.float32:
        shares = {"BLOCK_Q": 1, "BLOCK_K": 2} if arguments["PRECISION"] == "tf32" else {"BLOCK_Q": 2, "BLOCK_K": 4}
    fitted = {}
    for config in configs:
        wanted = {name: max(size // shares[name], 16) for name, size in config.kwargs.items()}
        blocks = {name: min(size, padded_dim(sizes[name])) for name, size in wanted.items()}
        num_warps, num_stages = config.num_warps, config.num_stages
        if all(blocks[name] < wanted[name] for name in blocks):  # one small block a cluster: nothing to choose between
            num_warps, num_stages = 4, 2
        fitted[*blocks.values(), num_warps, num_stages] = triton.Config(blocks, num_warps, num_stages)
    return list(fitted.values())
