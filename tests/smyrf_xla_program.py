"""SMYRF attention on torch-xla, its batch sharded over four devices: what `test_smyrf_xla.py` runs and looks at.

python smyrf_xla_program.py OUT DUMP    (DUMP is where XLA_FLAGS says that programs are written)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch_xla
import torch_xla.debug.metrics as metrics
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime
from torch import Tensor

from attention import SmyrfAttention

CASES = {
    "multiset": {},
    "union": {"merge": "union", "max_score_bytes": 4 * 4 * 64 * 64},  # a cluster at a time
    "causal": {"merge": "union", "causal_mask": True, "window": 5},
    "tree": {"transform": "none", "hashing": "rp-tree"},
    "long": {"q_cluster_size": 512, "k_cluster_size": 512},
    "long and bounded": {"q_cluster_size": 512, "k_cluster_size": 512, "max_score_bytes": 1 << 20},
}


def inputs(name: str) -> tuple[list[Tensor], Tensor]:
    """q, k (4, 1, N, 8), v (4, 1, N, 16) and a key mask, on the CPU."""
    length = 2048 if name.startswith("long") else 256
    torch.manual_seed(0)
    return [torch.randn(4, 1, length, dim) for dim in (8, 8, 16)], torch.rand(4, length) < 0.2


def outputs_and_gradients(name: str, leaves: list[Tensor], mask: Tensor) -> list[Tensor]:
    module = SmyrfAttention(**{"num_hashes": 3, "q_cluster_size": 64, "k_cluster_size": 64, "scale": 0.5} | CASES[name])
    leaves = [x.requires_grad_() for x in leaves]
    length = leaves[0].shape[2]
    torch.manual_seed(1)
    out = module(*leaves, mask, torch.randn(module.projection_shape(length, length, 8)).to(mask.device))
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def main(path: str, dump: str) -> None:
    torch_xla.runtime.use_spmd()
    count = torch_xla.runtime.global_runtime_device_count()
    mesh = spmd.Mesh(np.arange(count), (count,), ("data",))
    found = {"results": {}, "programs": {}}
    for name in CASES:
        leaves, mask = inputs(name)
        leaves, mask = [x.to("xla") for x in leaves], mask.to("xla")
        for x in (*leaves, mask):
            spmd.mark_sharding(x, mesh, ("data",) + (None,) * (x.ndim - 1))
        torch_xla.sync()
        before = set(Path(dump).iterdir())
        results = outputs_and_gradients(name, leaves, mask)
        torch_xla.sync(wait=True)
        found["programs"][name] = [str(file) for file in set(Path(dump).iterdir()) - before]
        found["results"][name] = [x.cpu() for x in results]
    found["fallbacks"] = [counter for counter in metrics.counter_names() if counter.startswith("aten::")]
    torch.save(found, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
