"""The one door to hardware: which device a run uses, and everything that differs between devices."""

from __future__ import annotations

import contextlib
import platform
import resource
from collections.abc import Callable
from typing import Any

import torch

from runtime.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Device:
    """A CPU. Subclasses change what another device does differently."""

    kind = "cpu"

    def __init__(self) -> None:
        self.torch_device = torch.device(self.kind)

    def describe(self) -> str:
        return f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on this device; the host does not wait for the copy."""
        return tensor.to(self.torch_device)

    def autocast(self, precision: str) -> contextlib.AbstractContextManager:
        """Computes matrix products and convolutions in `precision`; parameters keep theirs (float32)."""
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.kind, dtype=PRECISIONS[precision])

    def compile_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a whole training step, for devices that compile one; here it runs as it is."""
        return step

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


class CudaDevice(Device):
    kind = "cuda"

    def __init__(self) -> None:
        super().__init__()
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # shapes are fixed, so the search pays once

    def describe(self) -> str:
        return f"cuda ({torch.cuda.get_device_name()})"

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

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


def open_device(name: str = "auto") -> Device:
    """'cpu', 'cuda', or 'auto': cuda where there is one, else the cpu.

    Raises:
        UserError: there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return Device()
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "no CUDA device is usable here; use --device cpu, or install a torch built for your GPU's driver."
            )
        return CudaDevice()
    raise UserError(f"unknown device '{name}'; valid ones are auto, cpu, cuda.")
