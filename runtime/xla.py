"""TPUs, and whatever else PJRT drives, through torch_xla: a step is traced once and runs as one compiled program.

With several devices the program is partitioned by SPMD: batches are dealt over a mesh of all devices, everything else
is on each of them. Imported by `open_device` only where it is asked for; nothing else of the project imports torch_xla.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.debug.profiler as xp
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import nn
from torch_xla.utils.checkpoint import checkpoint

from runtime.device import Device
from runtime.errors import UserError

# The first step, and the second if something that the first one made enters it. A third graph is a defect.
MAX_GRAPHS_PER_STEP = 2


class XlaDevice(Device):
    kind = "xla"
    channels_last = False  # XLA lays tensors out itself

    def __init__(self) -> None:
        try:
            self.num_shards = xr.global_runtime_device_count()
        except (RuntimeError, OSError) as error:  # such as no TPU, or a TPU in another process's hands
            raise UserError(
                f"torch_xla cannot open a device: {str(error).splitlines()[0].rstrip('.')}. "
                "On a TPU set PJRT_DEVICE=TPU and end other processes that use it; without one, PJRT_DEVICE=CPU."
            ) from None
        self.mesh = None
        if self.num_shards > 1:
            xr.use_spmd()
            self.mesh = xs.Mesh(np.arange(self.num_shards), (self.num_shards,), ("data",))
        # Without this a TPU rounds the inputs of float32 products to bfloat16: hashes, singular values, features.
        logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns of several calls at the first one
        torch_xla.backends.set_mat_mul_precision("highest")
        self.torch_device = torch_xla.device()

    def describe(self) -> str:
        return f"xla ({self.num_shards} x {xm.xla_device_hw(self.torch_device)})"

    def use_cache(self, folder: str | os.PathLike) -> None:
        if xr.device_type() == "CPU" or torch_xla._XLAC._xla_computation_cache_is_initialized():
            return  # PJRT's CPU client writes programs that it cannot read back
        xr.initialize_cache(str(folder))

    def put(self, tensor: torch.Tensor, batch_dim: int | None = None) -> torch.Tensor:
        tensor = tensor.to(self.torch_device)
        if self.mesh is not None:
            axes = tuple("data" if dim == batch_dim else None for dim in range(tensor.dim()))
            xs.mark_sharding(tensor, self.mesh, axes)
        return tensor

    def put_network(self, network: nn.Module, memory_format: torch.memory_format) -> None:
        network.to(self.torch_device)
        for tensor in network.state_dict().values():
            if self.mesh is not None:
                xs.mark_sharding(tensor, self.mesh, (None,) * tensor.dim())

    def adam(self, parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Adam:
        """With its step count on the device and its state made now, so that the first step has the graph of all."""
        optimizer = torch.optim.Adam(parameters, capturable=True, **options)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    "step": self.put(torch.zeros(())),
                    "exp_avg": self.put(torch.zeros(parameter.shape)),
                    "exp_avg_sq": self.put(torch.zeros(parameter.shape)),
                }
        return optimizer

    def compile_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return torch_xla.compile(step, full_graph=True, name="step", max_different_graphs=MAX_GRAPHS_PER_STEP)

    def compile_network(self, network: nn.Module) -> Callable[..., Any]:
        raise UserError("--compile is torch.compile, for cpu and cuda; on xla the whole step is compiled in any case.")

    def recompute(self, function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
        # Integers go around the checkpoint: its barrier, which keeps XLA from merging both runs, breaks views of them.
        positions = [i for i, arg in enumerate(args) if arg.is_floating_point()]
        if not any(arg.requires_grad for arg in args):  # this form of checkpointing then gives no gradients at all
            args = (args[0].detach().requires_grad_(), *args[1:])

        def of_floats(*floats: torch.Tensor) -> torch.Tensor:
            replaced = dict(zip(positions, floats, strict=True))
            return function(*(replaced.get(i, arg) for i, arg in enumerate(args)))

        return checkpoint(of_floats, *(args[i] for i in positions))

    def seed(self, seed: int) -> None:
        super().seed(seed)
        xm.set_rng_state(seed, str(self.torch_device))

    def rng_state(self) -> dict[str, Any]:
        return super().rng_state() | {"xla": xm.get_rng_state(str(self.torch_device))}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        super().set_rng_state(state)
        if "xla" in state:
            xm.set_rng_state(state["xla"], str(self.torch_device))

    def synchronize(self) -> None:
        torch_xla.sync()
        xm.wait_device_ops()

    def peak_memory_gib(self) -> float:
        if xr.device_type() == "CPU":  # PJRT's CPU client keeps no account
            return super().peak_memory_gib()
        return xm.get_memory_info(self.torch_device)["peak_bytes_used"] / 2**30

    @contextlib.contextmanager
    def profile(self, folder: Path):
        self.synchronize()
        xp.start_trace(str(folder))
        yield
        self.synchronize()
        xp.stop_trace()

    def counters(self) -> dict[str, int]:
        def count(*metrics: str) -> int:
            return sum(data[0] for data in map(met.metric_data, metrics) if data)

        fallbacks = {name: met.counter_value(name) for name in met.counter_names() if name.startswith("aten::")}
        executions = count("ExecuteTime", "ExecuteReplicatedTime")  # on one device, on a mesh
        return {"compilations": count("CompileTime"), "executions": executions, **fallbacks}
