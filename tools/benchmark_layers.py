"""Times a whole attention layer of every mechanism over lengths, forward and backward, and measures its memory.

    python -m tools.benchmark_layers --lengths 1024,2048,4096,8192,16384 --json benchmarks/mechanism_layers_cpu.json

A layer is (B, N, C) -> (B, N, C) with its projections and the gradients of all its weights, as `hrrformer train` has
it; so the mechanisms that are no functions of q, k and v stand beside the others. Ratios are to dense attention in the
same round; with one thread on a CPU, times are the process's own. Options are those of `tools.compare_mechanisms`. What
would need more than --memory-limit-gib for its N x N matrices is left out at that length, and named.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import torch
from torch import Tensor, nn

from attention import available_attention, get_mechanism
from hrrformer.config import ModelConfig
from hrrformer.layers import self_attention
from runtime.device import open_device
from tools.benchmarking import describe_machine, interleave, peak_growth_mb, summarise_times, write_json
from tools.compare_mechanisms import OPTIONS, names_of

MATRICES = 5  # of N x N numbers a head that a training step of an N^2 mechanism holds at a time
WARM_UP_LENGTH = 256


def build(name: str, length: int, args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """A layer and its input x (1, N, C)."""
    torch.manual_seed(0)
    sizes = ModelConfig(dim=args.dim, num_heads=args.num_heads, max_length=length)
    layer = self_attention(sizes, name, OPTIONS.get(name, {})).to(args.device)
    return layer, torch.randn(1, length, args.dim, device=args.device, requires_grad=True)


def step(layer: nn.Module, x: Tensor) -> None:
    """Forward and backward, as one layer of a training step."""
    layer(x).square().sum().backward()
    layer.zero_grad(set_to_none=True)
    x.grad = None
    if x.is_cuda:
        torch.cuda.synchronize()


def measure_memory(name: str, length: int, args: argparse.Namespace) -> float:
    """Peak growth in MB of building the layer and of one step; runs in a process of its own."""
    torch.set_num_threads(args.threads)

    def call(length: int) -> None:
        step(*build(name, length, args))

    return peak_growth_mb(partial(call, WARM_UP_LENGTH), partial(call, length), args.device)


def measure(length: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for every mechanism that fits into memory at this length."""
    layers = {}
    for name in args.mechanisms:
        needed_gib = 4 * MATRICES * args.num_heads * length**2 / 2**30
        if get_mechanism(name).memory == "N^2" and needed_gib > args.memory_limit_gib:
            print(f"{name} at {length:,}: would need about {needed_gib:.1f} GiB, left out", file=sys.stderr)
        else:
            layers[name] = build(name, length, args)
    steps = {name: partial(step, *layer) for name, layer in layers.items()}
    times = interleave(steps, args.repeats, time.process_time if counts_cpu_time(args) else time.perf_counter)
    del layers, steps
    rows = []
    for name, row in summarise_times(times, "dense").items():
        with multiprocessing.get_context("spawn").Pool(1) as fresh_process:
            memory = fresh_process.apply(measure_memory, (name, length, args))
        rows.append({"method": name, "length": length, "pass": "fb", **row, "peak_growth_mb": round(memory, 1)})
        print(
            f"{name:16} {length:>7,} {row['median_ms']:11.1f} ms {row['time_ratio']:8.3f} of dense {memory:9.1f} MB",
            flush=True,
        )
    return rows


def counts_cpu_time(args: argparse.Namespace) -> bool:
    """Whether times are the process's own, which other work on the machine hardly changes."""
    return args.threads == 1 and args.device == "cpu"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.benchmark_layers", description=__doc__.splitlines()[0])
    parser.add_argument("--mechanisms", default="all", help="names separated by commas, or all; beside dense")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384", help="tokens, separated by commas")
    parser.add_argument("--dim", type=int, default=128, help="width C of the layer")
    parser.add_argument("--num-heads", type=int, default=4, help="attention heads")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.add_argument("--memory-limit-gib", type=float, default=8.0, help="what a mechanism may need by estimate")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
    args = parser.parse_args(argv)
    open_device(args.device)  # says so where there is none
    args.mechanisms = names_of(f"dense,{args.mechanisms}", available_attention(), "mechanism")
    try:
        args.lengths = [int(length) for length in args.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths takes numbers separated by commas, not {args.lengths}")
    if min(args.lengths) < 1 or min(args.repeats, args.threads, args.num_heads) < 1 or args.dim % args.num_heads:
        parser.error("lengths, repeats, threads and heads must be positive, and --dim a multiple of --num-heads")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    machine, rows = describe_machine(args.threads), []
    settings = {name: getattr(args, name) for name in ("dim", "num_heads", "repeats", "device")}
    settings |= {"dtype": "float32", "clock": "CPU time" if counts_cpu_time(args) else "wall clock"}
    for length in args.lengths:
        rows += measure(length, args)
        if args.json:
            write_json(args.json, {"machine": machine, "settings": settings, "results": rows})


if __name__ == "__main__":
    sys.exit(run_command(main))
