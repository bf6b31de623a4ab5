"""TPUs, and whatever else PJRT drives, through torch_xla: a step is traced once and runs as one compiled program.

With several devices the program is partitioned by SPMD: batches are dealt over a mesh of all devices of all hosts,
everything else is on each of them, or in parts (parameters, where asked for). Imported by `open_device` only where it
is asked for; nothing else of the project imports torch_xla.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
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
from torch.utils._pytree import tree_leaves, tree_map_only
from torch_xla.utils.checkpoint import CheckpointFunction

from runtime.checkpoint import host_copy
from runtime.device import Device, rows_of_shards
from runtime.distributed import Processes, join_hosts
from runtime.errors import UserError
from runtime.guard import step_where
from runtime.state import MOMENTS

# One suffices wherever it was counted; a second is for something that the first step makes and the second takes in.
MAX_GRAPHS_PER_STEP = 2
GATHERED_BYTES = 256 << 20  # of parameters in parts, whole on each device at once while they are saved


class XlaDevice(Device):
    kind = "xla"
    channels_last = False  # XLA lays tensors out itself
    compiles_each_shape = True

    def __init__(self) -> None:
        try:
            num_devices, num_hosts = xr.global_runtime_device_count(), xr.process_count()
        except (RuntimeError, OSError) as error:  # such as no TPU, or a TPU in another process's hands
            raise UserError(
                f"torch_xla cannot open a device: {str(error).splitlines()[0].rstrip('.')}. "
                "On a TPU set PJRT_DEVICE=TPU and end other processes that use it; without one, PJRT_DEVICE=CPU."
            ) from None
        self.mesh = None
        if num_devices > 1:
            xr.use_spmd()
            self.mesh = xs.Mesh(np.arange(num_devices), (num_devices,), ("data",))
        super().__init__(join_hosts() if num_hosts > 1 else Processes())
        self.num_shards = num_devices
        # Without this a TPU rounds the inputs of float32 products to bfloat16: hashes, singular values, features.
        logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns of several calls at the first one
        torch_xla.backends.set_mat_mul_precision("highest")
        self.torch_device = torch_xla.device()
        # Which parts of a dealt batch are this host's: its devices' numbers, which need not be next to each other.
        self.local_shards = [int(name.rsplit(":", 1)[1]) for name in torch_xla._XLAC._xla_get_runtime_devices()]

    def describe(self) -> str:
        return f"xla ({self.num_shards} x {xm.xla_device_hw(self.torch_device)})"

    def use_cache(self, folder: str | os.PathLike) -> None:
        if xr.device_type() == "CPU" or torch_xla._XLAC._xla_computation_cache_is_initialized():
            return  # PJRT's CPU client writes programs that it cannot read back
        folder = Path(folder) / f"host-{self.processes.index}"  # hosts may share a disk, and each writes its programs
        folder.mkdir(parents=True, exist_ok=True)
        xr.initialize_cache(str(folder))

    def local_rows(self, batch_size: int) -> torch.Tensor:
        return rows_of_shards(batch_size, self.num_shards, self.local_shards)

    def put(self, tensor: torch.Tensor, batch_dim: int | None = None, local: bool = False) -> torch.Tensor:
        axes = tuple("data" if dim == batch_dim else None for dim in range(tensor.dim()))
        if self.mesh is not None and local:  # each local device gets its part; the other hosts see to the rest
            parts = [part.contiguous() for part in tensor.chunk(len(self.local_shards), batch_dim)]
            return torch_xla._XLAC._global_tensor_from_cpu_shards(parts, self.mesh.get_op_sharding(axes))
        return self._put(tensor, axes)

    def _put(self, tensor: torch.Tensor, axes: tuple[str | None, ...]) -> torch.Tensor:
        if tensor.dim() == 0:
            # It would enter the program as a constant, or share its memory with an equal one, and after the first step
            # not any more: a second program.
            tensor = tensor.cpu().reshape(1).to(self.torch_device).squeeze().clone()
        tensor = tensor.to(self.torch_device)
        self._lay_out(tensor, axes)
        return tensor

    def _lay_out(self, tensor: torch.Tensor, axes: tuple[str | None, ...]) -> None:
        if self.mesh is not None:
            xs.mark_sharding(tensor, self.mesh, axes)

    def all_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        self._lay_out(tensor, (None,) * tensor.dim())  # else reading it runs a program of its own
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor  # here and below: XLA's program has summed over all devices of all hosts

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def to_host(self, tree: Any) -> Any:
        """What lies in parts is put together on the devices first, by one program for `GATHERED_BYTES` of it."""
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and _is_sharded(leaf)]
        copies = {}
        while tensors:
            group, size = [], 0
            while tensors and size < GATHERED_BYTES:
                group.append(tensors.pop())
                size += group[-1].nbytes
            whole = [tensor.detach() * 1 for tensor in group]
            for tensor in whole:
                self._lay_out(tensor, (None,) * tensor.dim())
            torch_xla.sync()
            copies |= {id(tensor): copy.cpu() for tensor, copy in zip(group, whole, strict=True)}
        return tree_map_only(
            torch.Tensor, lambda leaf: copies[id(leaf)] if id(leaf) in copies else host_copy(leaf), tree
        )

    def put_network(
        self, network: nn.Module, memory_format: torch.memory_format, shard_parameters: bool = False
    ) -> None:
        network.to(self.torch_device)
        for tensor in network.state_dict(keep_vars=True).values():
            sharded = shard_parameters and isinstance(tensor, nn.Parameter)
            tensor.mesh_axes = sharded_axes(tensor.shape, self.num_shards) if sharded else (None,) * tensor.dim()
            self._lay_out(tensor, tensor.mesh_axes)
        network.register_load_state_dict_pre_hook(self._load)
        if shard_parameters and self.mesh is not None:
            for module in network.modules():
                module.register_forward_pre_hook(self._gather_parameters)
                module.register_forward_hook(_release_parameters, always_call=True)

    def _gather_parameters(self, module: nn.Module, _: Any) -> None:
        """For one forward pass a module sees its parameters whole.

        Left to itself the partitioner would gather activations instead, which are larger.
        """
        for name, parameter in module.named_parameters(recurse=False):
            if "data" in parameter.mesh_axes:
                module.__dict__[name] = _Gathered.apply(parameter, self._lay_out)  # found before the parameter itself

    def _load(self, network: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
        """Before `load_state_dict` copies, gives each parameter its value as memory of its own, and that to copy.

        Copied into, it would enter the next step with the memory of the source, and the step after with its own: a
        second program.
        """
        for name, target in network.state_dict(keep_vars=True).items():
            value = state.get(prefix + name)
            if value is not None and value.shape == target.shape:
                target.data = self._put(value.to(target.dtype), target.mesh_axes)
                state[prefix + name] = target

    def adam(self, parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Adam:
        """With its step count on the device and its state made now, so that the first step has the graph of all."""
        optimizer = torch.optim.Adam(parameters, capturable=True, **options)
        self._put_state(optimizer)
        optimizer.register_load_state_dict_post_hook(self._put_state)
        return optimizer

    def _put_state(self, optimizer: torch.optim.Adam) -> None:
        """Gives each parameter the state that it lacks. Moments lie as their parameters do."""
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state[parameter]
            for name in MOMENTS:
                moment = state.get(name, torch.zeros(parameter.shape, dtype=parameter.dtype))
                state[name] = self._put(moment, parameter.mesh_axes)
            state["step"] = self.put(state.get("step", torch.zeros(())))

    def update(self, optimizer: torch.optim.Optimizer, healthy: torch.Tensor) -> None:
        step_where(healthy, optimizer)

    def compile_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        torch_xla.sync()  # what is pending (initial state, a loaded checkpoint) would be a part of the first program
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

        return _Recomputed.apply(of_floats, True, *(args[i] for i in positions))

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


class _Recomputed(CheckpointFunction):
    """torch_xla's own, but the second run takes in the gradient, and so differs from the first and waits for it.

    The barrier alone is gone before XLA's CPU compiler merges what is equal, and with it all that was to be saved.
    """

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        function, zeros = ctx.run_function, 0.0 * gradient.flatten(1)[:, 0]  # (B,): each row of a dealt batch its own

        def second_run(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return function(x + zeros.to(x.dtype).view(-1, *(1,) * (x.dim() - 1)), *rest)

        ctx.run_function = second_run
        return CheckpointFunction.backward(ctx, gradient)


class _Gathered(torch.autograd.Function):
    """A parameter, whole on every device; its gradient lies in parts again."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, lay_out: Callable[..., None]) -> torch.Tensor:
        ctx.axes, ctx.lay_out = parameter.mesh_axes, lay_out
        whole = parameter * 1  # a copy would keep the layout of the original
        lay_out(whole, (None,) * whole.dim())
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # First the sum over the batch, then a part of it; asked for the part alone, it would gather activations.
        for axes in ((None,) * gradient.dim(), ctx.axes):
            gradient = gradient * 1
            ctx.lay_out(gradient, axes)
        return gradient, None


def _release_parameters(module: nn.Module, *_: Any) -> None:
    for name in module._parameters.keys() & module.__dict__.keys():
        del module.__dict__[name]


def _is_sharded(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "xla" and torch_xla._XLAC._get_xla_sharding_type(tensor) == xs.ShardingType.TILED


def sharded_axes(shape: Sequence[int], num_shards: int) -> tuple[str | None, ...]:
    """Deals the largest dimension that divides evenly over the mesh: for (256, 128, 3, 3), ("data", None, None, None).

    Vectors stay whole: to gather them would cost more than they weigh. So does what divides nowhere.
    """
    fitting = [size if size % num_shards == 0 else 0 for size in shape]
    if len(shape) < 2 or not any(fitting):
        return (None,) * len(shape)
    largest = fitting.index(max(fitting))
    return tuple("data" if dim == largest else None for dim in range(len(shape)))
