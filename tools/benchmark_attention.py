"""Times SMYRF's back-ends against their naive twin and against fused dense attention, and measures their memory.

    python -m tools.benchmark_attention
    python -m tools.benchmark_attention --q-length 65536 --k-length 16384 --q-cluster-size 1024 --k-cluster-size 256

On a shared machine absolute times say little. Every round therefore runs every method once, and a method's ratio is
the median over rounds of its time by the naive twin's in the same round. Memory is, on a CPU, the growth of the
process's peak resident size (VmHWM, reset through /proc/self/clear_refs; Linux only) in a process of its own, after a
warm-up at a small size; on CUDA, the growth of what torch has allocated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import torch
from torch import Tensor

from attention import clustered_attention, dense_attention
from attention.smyrf.clusters import cluster_orders
from attention.smyrf.naive import naive_clustered_attention
from runtime.device import open_device

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
PASS_NAMES = {"f": "forward", "fb": "forward + backward"}


def build_methods(args: argparse.Namespace) -> dict[str, Attend]:
    """Every method as a function of q, k, v with scale 1; the naive twin comes first, as the baseline.

    All SMYRF methods hash and sort inside the measured call, with the same projections.
    """
    projections = torch.randn(args.head_dim + 2, args.num_hashes, generator=torch.Generator().manual_seed(1))
    projections = projections.to(args.device)
    sizes = (args.q_cluster_size, args.k_cluster_size)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        orders = cluster_orders(q, k, projections, *sizes)
        return naive_clustered_attention(q, k, v, *orders, *sizes, scale=1.0)

    def smyrf(backend: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            orders = cluster_orders(q, k, projections, *sizes)
            return clustered_attention(q, k, v, *orders, *sizes, scale=1.0, backend=backend)

        return attend

    return {
        "naive": naive,
        "einsum": smyrf("einsum"),
        "flash": smyrf("flash"),
        "dense": lambda q, k, v: dense_attention(q, k, v, scale=1.0),
    }


def make_inputs(args: argparse.Namespace, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q (1, 1, Nq, D), k (1, 1, Nk, D), v (1, 1, Nk, Dv), as many tokens as fill `clusters` clusters."""
    generator = torch.Generator().manual_seed(0)
    q_length = min(args.q_length, clusters * args.q_cluster_size)
    k_length = min(args.k_length, clusters * args.k_cluster_size)
    shapes = ((q_length, args.head_dim), (k_length, args.head_dim), (k_length, args.value_dim))
    dtype = getattr(torch, args.dtype)
    return tuple(torch.randn(1, 1, *shape, generator=generator).to(args.device, dtype) for shape in shapes)


def run(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor], passes: str) -> None:
    """One forward pass ("f") or one forward and backward pass ("fb")."""
    if passes == "f":
        with torch.no_grad():
            attend(*inputs)
    else:
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.grad(attend(*leaves).float().square().sum(), leaves)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()


def measure_times(args: argparse.Namespace, passes: str) -> dict[str, list[float]]:
    """Milliseconds per method and round, methods interleaved; the first round warms up and is dropped."""
    methods, inputs = build_methods(args), make_inputs(args, clusters=args.q_length)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(args.repeats + 1):
        for name, attend in methods.items():
            start = time.perf_counter()
            run(attend, inputs, passes)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def measure_memory(args: argparse.Namespace, name: str, passes: str) -> float:
    """Peak growth in MB of one call; meant for a fresh process."""
    torch.set_num_threads(args.threads)
    attend = build_methods(args)[name]
    run(attend, make_inputs(args, clusters=1), passes)
    inputs = make_inputs(args, clusters=args.q_length)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(attend, inputs, passes)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew
    before = _peak_resident_kb()
    run(attend, inputs, passes)
    return (_peak_resident_kb() - before) / 1024


def _peak_resident_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def summarise(times: dict[str, list[float]], memory: dict[str, float]) -> dict[str, dict[str, float]]:
    """Medians, and ratios to the naive twin (medians of the ratios in each round)."""
    return {
        name: {
            "median_ms": round(statistics.median(values), 1),
            "time_ratio": round(statistics.median(a / b for a, b in zip(values, times["naive"], strict=True)), 3),
            "peak_growth_mb": round(memory[name], 1),
            "memory_ratio": round(memory[name] / memory["naive"], 3),
        }
        for name, values in times.items()
    }


def describe_machine(threads: int) -> dict[str, object]:
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
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.benchmark_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--q-length", type=int, default=16384, help="queries")
    parser.add_argument("--k-length", type=int, default=4096, help="keys")
    parser.add_argument("--num-hashes", type=int, default=4, help="hash rounds")
    parser.add_argument("--q-cluster-size", type=int, default=2048, help="queries a cluster; divides their number")
    parser.add_argument("--k-cluster-size", type=int, default=512, help="keys a cluster; divides their number")
    parser.add_argument("--head-dim", type=int, default=24, help="head size of queries and keys")
    parser.add_argument("--value-dim", type=int, default=96, help="head size of values")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--passes", default="f,fb", help="f = forward, fb = forward and backward; both: f,fb")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of q, k and v")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="also write the results here")
    args = parser.parse_args(argv)
    args.passes = args.passes.split(",")
    open_device(args.device)  # says so where there is none
    if unknown := set(args.passes) - set(PASS_NAMES):
        parser.error(f"--passes takes f and fb, not {', '.join(sorted(unknown))}")
    q_clusters, q_rest = divmod(args.q_length, args.q_cluster_size)
    k_clusters, k_rest = divmod(args.k_length, args.k_cluster_size)
    if q_rest or k_rest or q_clusters != k_clusters:
        parser.error("cluster sizes must divide the lengths into as many clusters of queries as of keys")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    machine = describe_machine(args.threads)
    results = {}
    for passes in args.passes:
        times = measure_times(args, passes)
        memory = {}
        for name in times:
            with multiprocessing.get_context("spawn").Pool(1) as fresh_process:
                memory[name] = fresh_process.apply(measure_memory, (args, name, passes))
        results[passes] = summarise(times, memory)
        print(f"\n{PASS_NAMES[passes]:20} {'median ms':>10} {'time / naive':>13} {'peak MB':>9} {'memory / naive':>15}")
        for name, row in results[passes].items():
            print(
                f"{name:20} {row['median_ms']:10.1f} {row['time_ratio']:13.3f} "
                f"{row['peak_growth_mb']:9.1f} {row['memory_ratio']:15.3f}"
            )
    if args.json is not None:
        options = {name: value for name, value in vars(args).items() if name not in ("json", "threads")}
        record = {"machine": machine, "options": options, "results": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
