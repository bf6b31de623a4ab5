"""Compiles the kernels that a call launches for a Hopper GPU (sm_90), on a machine without any: nothing is run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

SHARED_MEMORY = 227 * 1024  # bytes a block may take


class Compiled(NamedTuple):
    """A compiled kernel: registers a thread, bytes a thread spilled to the stack, bytes of shared memory a block."""

    name: str
    registers: int
    stack: int
    shared: int
    ptx: str


class _Hopper:
    """What Triton asks of a driver while it compiles and tunes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self):
        def benchmark(call, quantiles) -> list[float]:
            call()
            return [1.0 for _ in quantiles]

        return benchmark


@contextmanager
def compiled_for_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """Every launch inside compiles, with all candidates of the autotuner, and appends to the list that this yields."""
    compiled: list[Compiled] = []
    seen = set()
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            compiled.append(_describe(kernel))
        if kernel.metadata.shared > SHARED_MEMORY:
            raise OutOfResources(kernel.metadata.shared, SHARED_MEMORY, "shared memory")
        return kernel

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    driver.set_active(_Hopper())
    yield compiled
    driver.set_active(None)
    monkeypatch.undo()


def _describe(kernel) -> Compiled:
    """Reads registers and stack off the machine code."""
    cubin = Path(triton.runtime.cache.get_cache_manager(kernel.hash).cache_dir) / f"{kernel.name}.cubin"
    command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(kernel.name, registers, stack, kernel.metadata.shared, kernel.asm["ptx"])
