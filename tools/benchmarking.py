"""What the benchmarks share: interleaved timing, peak memory in a process of its own, and the machine's description.

On a shared machine absolute times say little. Every round therefore runs every method once, and a method's ratio is the
median over rounds of its time by the baseline's in the same round. Memory is, on a CPU, the growth of the process's
peak resident size (VmHWM, reset through /proc/self/clear_refs; Linux only); on CUDA, of what torch has allocated.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from runtime.errors import RunError, UserError


class Worker:
    """A script of this folder in a process of its own, which answers each line on its stdin with a line of JSON.

    It is stopped (SIGSTOP) until it is asked: threads that wait by spinning take no core from other workers.

    Args:
        name: its first argument; names it in messages.
        python: the interpreter.
        environment: variables beside those of this process, or None for such as it shall not have.
    """

    def __init__(self, name: str, python: str, script: str, *arguments: object, **environment: str | None) -> None:
        root = Path(__file__).parents[1]
        command = [python, root / "tools" / script, name, *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(root)} | environment
        environment = {variable: value for variable, value in environment.items() if value is not None}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.name = name
        weakref.finalize(self, self.process.kill)  # at the latest when this process ends: a stopped one sees no end

    def ask(self, *order: object) -> dict[str, float]:
        """Raises RunError where the process has ended."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            print(*order, file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise RunError(f"the process of {self.name!r} ended; its own message is above")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def interleave(
    methods: Mapping[str, Callable[[], None]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Milliseconds of every method in every round; a first round warms up and is dropped.

    With one thread on a CPU, `time.process_time` as the clock leaves out what other processes take.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats + 1):
        for name, method in methods.items():
            start = clock()
            method()
            times[name].append(1e3 * (clock() - start))
    return {name: values[1:] for name, values in times.items()}


def summarise_times(times: Mapping[str, list[float]], baseline: str | None) -> dict[str, dict[str, Any]]:
    """Median and quartiles in ms, and the ratio to the baseline: the median of the ratios in each round, or None."""
    summary = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        ratios = [a / b for a, b in zip(values, times[baseline], strict=True)] if baseline else []
        summary[name] = {
            "median_ms": round(median, 2),
            "quartiles_ms": [round(low, 2), round(high, 2)],
            "time_ratio": round(statistics.median(ratios), 4) if ratios else None,
        }
    return summary


def growth_exponent(first: Mapping[str, Any], last: Mapping[str, Any], quantity: str, length: str) -> float:
    """e, where a quantity of two rows of results grows as the e-th power of their length; rounded."""
    return round(math.log(last[quantity] / first[quantity]) / math.log(last[length] / first[length]), 3)


@cache
def seconds_per_operation(dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """On the CPU: of an operation in a product of 2,048 x 2,048 matrices, and of an exponential; medians of ten."""
    torch.set_num_threads(threads)
    x, out = torch.randn(2, 2048, 2048).to(dtype)
    calls = {"product": lambda: torch.mm(x, x, out=out), "exponential": lambda: torch.exp(x, out=out)}
    seconds = {name: statistics.median(values) / 1e3 for name, values in interleave(calls, 10).items()}
    return seconds["product"] / (2 * 2048**3), seconds["exponential"] / 2048**2


def peak_growth_mb(warm_up: Callable[[], None], call: Callable[[], None], device: str) -> float:
    """How much one call adds to the peak memory; meant for a fresh process, whose freed memory cannot hide growth."""
    warm_up()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew
    before = _peak_resident_kb()
    call()
    return (_peak_resident_kb() - before) / 1024


def _peak_resident_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def describe_machine(threads: int) -> dict[str, Any]:
    """Hardware, threads, load from all processes, versions and date, for the record."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def machine_title(record: Mapping[str, Any]) -> str:
    """Hardware, number format and date of a record with `machine` and `settings`, for a plot."""
    machine, settings = record["machine"], record["settings"]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    hardware = machine["gpu"] if settings["device"] == "cuda" else f"{machine['cpu']}, {threads}"
    return f"{hardware}, {settings['dtype']}, {machine['date']}"


def read_json(path: Path) -> Any:
    """What `write_json` wrote; UserError where there is no such file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is no JSON file of results.") from None


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
