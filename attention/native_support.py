"""Kernels in C for CPUs: built by the machine's own compiler when they are first needed, and kept for later programs.

As Triton does it for GPUs: what is built fits the processor that it runs on, and nothing need be installed but a C
compiler. The kernels share torch's threads: their calls of OpenMP find the library that torch has loaded.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

COMPILERS = ("gcc", "cc")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-fPIC", "-fopenmp")  # errno bars vector sqrtf
BUILD_SECONDS = 120
KEPT_BYTES = 1 << 25  # of scratch memory
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOURCES = {name: Path(__file__).parent / name / "native.c" for name in ("hrr", "smyrf")}
HEADER = Path(__file__).parent / "native.h"


class BuildError(Exception):
    """Why there are no kernels, as the end of a sentence."""


def native_obstacle(name: str, *tensors: Tensor) -> str | None:
    """Why the kernels of this name cannot run on these tensors, as the end of a sentence; None where they can."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"needs tensors on a CPU, not {x.device.type}; use backend 'flash'"
        if x.dtype not in DTYPES:
            return f"computes in float32, not {x.dtype}; use backend 'flash'"
    return _build_obstacle(name)


@torch.compiler.assume_constant_result  # torch.compile asks while it traces, instead of breaking the graph
def _build_obstacle(name: str) -> str | None:
    try:
        load_kernels(name)
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def _build(name: str, flags: tuple[str, ...]) -> ctypes.CDLL | BuildError:
    try:
        return ctypes.CDLL(str(_built(SOURCES[name], flags)))
    except (OSError, BuildError, subprocess.SubprocessError) as error:
        return BuildError(f"could not be built: {error}")


def load_kernels(name: str, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The functions of a C file, one of SOURCES.

    Raises:
        BuildError: there is no compiler, it refuses, or what it makes does not fit torch.
    """
    found = _build(name, flags)
    if isinstance(found, BuildError):
        raise found
    return found


class _Scratch(threading.local):
    memory = torch.empty(0, device="cpu")


_scratch = _Scratch()


def scratch_memory(size: int) -> Tensor:
    """`size` floats for a kernel to work in, this thread's until its next call.

    Up to KEPT_BYTES stay its own: the C library hands freed memory back to the system, which clears every page again.
    """
    if len(_scratch.memory) >= size:
        return _scratch.memory
    memory = torch.empty(size, dtype=torch.float32, device="cpu")
    if memory.nbytes <= KEPT_BYTES:
        _scratch.memory = memory
    return memory


def _built(source: Path, flags: tuple[str, ...]) -> Path:
    """The library of a source, from the cache or new. Its name tells everything that it depends on."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise BuildError("there is no C compiler; install gcc, or set CC")
    text = source.read_bytes() + HEADER.read_bytes()
    parts = (compiler, *flags, platform.platform(), _processor())
    name = hashlib.sha256("\0".join(parts).encode() + text).hexdigest()[:24] + ".so"
    library = cache_folder() / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / name
            # Compiled and linked apart: linked with -fopenmp, it would bring a second OpenMP with threads of its own.
            for arguments in (
                [*flags, "-c", str(source), "-o", f"{built}.o"],
                ["-shared", f"{built}.o", "-o", str(built), "-lm"],
            ):
                run = subprocess.run(
                    [*compiler.split(), *arguments], capture_output=True, text=True, timeout=BUILD_SECONDS
                )
                if run.returncode:
                    raise BuildError(f"{compiler} says {run.stderr.strip()[-500:]}")
            os.replace(built, library)  # at once: other processes may be building it too
    return library


def cache_folder() -> Path:
    """Where kernels are kept: $XDG_CACHE_HOME or ~/.cache; where these cannot be written, a folder for this process."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "smyrf-hrr"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="smyrf-hrr-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> str:
    """What -march=native depends on: home folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
