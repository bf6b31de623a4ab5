"""The one door to hardware: which device a run uses, and everything that differs between devices."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import resource
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime import distributed
from runtime.checkpoint import host_copy
from runtime.distributed import Processes
from runtime.errors import UserError
from runtime.guard import step_where
from runtime.state import MOMENTS

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Device:
    """A CPU. Subclasses change what another device does differently.

    Attributes:
        processes: this process among those of the run, which deal each batch among them.
        num_shards: the devices that a batch is dealt over.
        channels_last: whether images may be kept in channels-last memory order.
        compiles_each_shape: whether a batch of another size costs a compilation, so that it is better padded.
    """

    kind = "cpu"
    channels_last = True
    compiles_each_shape = False

    def __init__(self, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.num_shards = self.processes.count
        self.torch_device = torch.device(self.kind)

    def describe(self) -> str:
        several = f"{self.processes.count} x " if self.processes.count > 1 else ""
        return f"{several}{self._describe_one()}"

    def _describe_one(self) -> str:
        return f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"

    def use_cache(self, folder: str | os.PathLike) -> None:
        """Keeps compiled programs in `folder`, on devices that compile; call it before anything is computed."""

    def local_rows(self, batch_size: int) -> torch.Tensor:
        """Which rows of a batch this process must have: int64 (batch_size / num processes,).

        Raises:
            ValueError: the batch cannot be dealt evenly.
        """
        return rows_of_shards(batch_size, self.num_shards, [self.processes.index])

    def put(self, tensor: torch.Tensor, batch_dim: int | None = None, local: bool = False) -> torch.Tensor:
        """A host tensor on this device; the host does not wait for the copy.

        Args:
            batch_dim: the dimension that is dealt over the devices, where there are several; None copies to each.
            local: of that dimension, the tensor has only the `local_rows`.
        """
        return self._own_rows(tensor, batch_dim, local).to(self.torch_device)

    def _own_rows(self, tensor: torch.Tensor, batch_dim: int | None, local: bool) -> torch.Tensor:
        if self.processes.count == 1 or batch_dim is None or local:
            return tensor
        return tensor.index_select(batch_dim, self.local_rows(tensor.shape[batch_dim]))

    def all_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of what was computed from a dealt batch, in its order along the first dimension.

        Inside a function that `compile_step` wraps, where there is one.
        """
        return tensor if self.processes.count == 1 else distributed.all_rows(tensor)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of what each process has computed from its rows; without a gradient."""
        return tensor if self.processes.count == 1 else distributed.all_mean(tensor)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes gradients of means over a process's rows gradients of means over the whole batch.

        To be called after the backward pass, before anything looks at the gradients.
        """
        if self.processes.count > 1:
            distributed.average(p.grad for p in parameters if p.grad is not None)

    def to_host(self, tree: Any) -> Any:
        """Copies of a tree's tensors in host memory; where several processes hold parts of one, all must call it."""
        return host_copy(tree)

    def put_network(
        self, network: nn.Module, memory_format: torch.memory_format, shard_parameters: bool = False
    ) -> None:
        """Moves a network made on the host to this device, or a copy to each of several.

        Args:
            shard_parameters: each device keeps only a part of every matrix, and of the state that `adam` makes for it.

        Raises:
            UserError: `shard_parameters` on a device that has no such thing.
        """
        if shard_parameters:
            raise UserError("--shard-parameters is for xla; on cpu and cuda each process has the whole networks.")
        network.to(self.torch_device, memory_format=memory_format)

    def adam(self, parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Adam:
        """Adam, options as torch's; the parameters must be on this device, in their memory format, already.

        Fused: one pass over memory, and a rate that is a tensor on the device is read without waiting for it.
        """
        optimizer = torch.optim.Adam(parameters, fused=True, **options)
        optimizer.register_load_state_dict_post_hook(_lay_out_moments)
        return optimizer

    def update(self, optimizer: torch.optim.Optimizer, healthy: torch.Tensor) -> None:
        """`optimizer.step()` where `healthy`, bool () on this device, is true; the host does not wait to know it."""
        if healthy:  # in host memory here
            optimizer.step()

    def autocast(self, precision: str) -> contextlib.AbstractContextManager:
        """Computes matrix products and convolutions in `precision`; parameters keep theirs (float32)."""
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.kind, dtype=PRECISIONS[precision])

    def compile_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a whole step, for devices that compile it to one program; here it runs as it is.

        All that the step takes from the host must come in tensors that `put` returned.
        """
        return step

    def compile_network(self, network: nn.Module) -> Callable[..., Any]:
        """The network compiled by torch.compile, once for each of the few shapes that a step has."""
        # Blocks share their class's code, and each block, shape and mode of a step counts against one limit.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
        return torch.compile(network, dynamic=False)

    def recompute(self, function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
        """function(*args), whose intermediate results are computed a second time in the backward pass, not kept.

        The result and the first of `args` have a batch as their first dimension.
        """
        return checkpoint(function, *args, use_reentrant=False)

    def seed(self, seed: int) -> None:
        """Seeds the random numbers drawn on the device and on the host."""
        torch.manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        return {"host": torch.get_rng_state()}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["host"])

    def synchronize(self) -> None:
        """Waits until all that was asked of the device is done."""

    def peak_memory_gib(self) -> float:
        """The most memory used so far: of the process on a CPU, of the device elsewhere."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB

    @contextlib.contextmanager
    def profile(self, folder: Path):
        """Writes a trace of what runs inside to `folder`, for TensorBoard's profile plugin."""
        from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.kind == "cuda")
        with profile(activities=activities, on_trace_ready=tensorboard_trace_handler(str(folder))):
            yield
            self.synchronize()

    def counters(self) -> dict[str, int]:
        """What the device's compiler counted since the start: compilations, executions, fallbacks to the host."""
        return {}


class CudaDevice(Device):
    kind = "cuda"

    def __init__(self, processes: Processes | None = None) -> None:
        super().__init__(processes)
        torch.cuda.set_device(self.processes.local_index)  # what "cuda" means from now on
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # shapes are fixed, so the search pays once

    def _describe_one(self) -> str:
        return f"cuda ({torch.cuda.get_device_name()})"

    def put(self, tensor: torch.Tensor, batch_dim: int | None = None, local: bool = False) -> torch.Tensor:
        return self._own_rows(tensor, batch_dim, local).pin_memory().to(self.torch_device, non_blocking=True)

    def update(self, optimizer: torch.optim.Optimizer, healthy: torch.Tensor) -> None:
        step_where(healthy, optimizer)

    def rng_state(self) -> dict[str, Any]:
        return super().rng_state() | {"cuda": torch.cuda.get_rng_state()}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        super().set_rng_state(state)
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30


def _lay_out_moments(optimizer: torch.optim.Adam) -> None:
    """Gives loaded moments the strides of their parameters: the fused step takes them for granted."""
    for parameter, state in optimizer.state.items():
        for name in state.keys() & set(MOMENTS):
            state[name] = torch.empty_like(parameter, requires_grad=False).copy_(state[name])


def rows_of_shards(batch_size: int, num_shards: int, shards: Sequence[int]) -> torch.Tensor:
    """The rows of the given ones of `num_shards` equal parts of a batch, in the order given: int64 (rows,).

    Raises:
        ValueError: the parts would not be equal.
    """
    if batch_size % num_shards:
        raise ValueError(f"a batch of {batch_size} cannot be dealt evenly over {num_shards} devices")
    size = batch_size // num_shards
    return torch.cat([torch.arange(shard * size, (shard + 1) * size) for shard in shards])


def open_device(name: str = "auto") -> Device:
    """'cpu', 'cuda', 'xla', or 'auto': xla where torch_xla is installed and PJRT_DEVICE is set, else cuda, else cpu.

    Under torchrun it joins the other processes; on a TPU slice, the other hosts.

    Raises:
        UserError: there is no such device on this machine.
    """
    has_xla = importlib.util.find_spec("torch_xla") is not None
    if name == "auto":
        name = "xla" if has_xla and os.environ.get("PJRT_DEVICE") else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return Device(distributed.join_torchrun("gloo"))
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "no CUDA device is usable here; use --device cpu, or install a torch built for your GPU's driver."
            )
        return CudaDevice(distributed.join_torchrun("cpu:gloo,cuda:nccl"))
    if name == "xla":
        if not has_xla:
            raise UserError("--device xla needs torch_xla; install it with: pip install '.[tpu]'")
        if distributed.launched_count() > 1:
            raise UserError("on xla one process drives all devices of a host: start it without torchrun.")
        from runtime.xla import XlaDevice

        return XlaDevice()
    raise UserError(f"unknown device '{name}'; valid ones are auto, cpu, cuda, xla.")
