"""Times attention mechanisms against fused dense attention over lengths, and measures their memory and their error.

    python -m tools.benchmark_attention                                     SMYRF and its naive twin, 16,384 x 4,096
    python -m tools.benchmark_attention --mechanisms smyrf --lengths 4096,16384,65536 \\
        --set smyrf.q_cluster_size=512 --set smyrf.k_cluster_size=128 --plot crossover.png
    python -m tools.benchmark_attention --keys equal --mechanisms all --lengths 1024,4096,16384 --head-dim 64

With `--keys quarter` there are a quarter as many keys as queries and values are four times as wide, as in the GAN; with
`--keys equal` all are alike, as in a sequence model. Dense attention is torch's scaled_dot_product_attention, with
queries and keys padded to the values' head size where the CPU's fused kernel wants that. "smyrf-naive" is SMYRF written
as the paper's own code is; "smyrf-BACKEND" names a back-end. A mechanism is reported only where it passes its check at
that size: against itself in float64, and SMYRF against the sum over the clusters of 64 of its queries.

Memory is handed out as in any program that imports the library; KEEP_FREED_MEMORY=1 measures as the training commands
run, which keep what they free. That makes the naive twin faster, and hardly anything else.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("KEEP_FREED_MEMORY", "0")

# Before torch, for it makes idle threads sleep.
from runtime.cli import KEEPS_FREED_MEMORY, CommandParser, run_command  # isort: skip

import torch
from torch import Tensor

from attention import available_attention, build_attention, dense_attention, get_mechanism, smyrf_attention
from attention.smyrf.clusters import cluster_orders, resolve_cluster_sizes
from attention.smyrf.naive import naive_clustered_attention
from runtime.device import open_device
from runtime.errors import RunError
from tools.attention_plots import plot_crossover
from tools.benchmarking import (
    describe_machine,
    growth_exponent,
    interleave,
    peak_growth_mb,
    seconds_per_operation,
    summarise_times,
    write_json,
)
from tools.mechanism_figure import draw_figure

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
PASS_NAMES = {"f": "forward", "fb": "forward + backward"}
SMYRF_BACKENDS = ("naive", "einsum", "flash", "native", "triton")
SMYRF_OPTIONS = {"num_hashes": 4, "q_cluster_size": 2048, "k_cluster_size": 512, "merge": "multiset"}
CHECKED_QUERIES = 64
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def is_smyrf(name: str) -> bool:
    return name == "smyrf" or name.removeprefix("smyrf-") in SMYRF_BACKENDS


def build_method(name: str, length: int, args: argparse.Namespace, dtype: torch.dtype) -> Attend:
    """A mechanism as a function of q, k, v with scale 1, or 1/sqrt(D) for those that have no scale of their own.

    SMYRF hashes and sorts inside the measured call, with the same projections in every back-end.
    """
    options = dict(args.options.get(name.split("-")[0] if is_smyrf(name) else name, {}))
    if name == "dense":
        return lambda q, k, v: dense_attention(q, k, v, scale=1.0)
    if is_smyrf(name):
        options = SMYRF_OPTIONS | options
        sizes, merge = (options["q_cluster_size"], options["k_cluster_size"]), options["merge"]
        generator = torch.Generator().manual_seed(1)
        projections = torch.randn(args.head_dim + 2, options["num_hashes"], generator=generator).to(args.device, dtype)
        if name == "smyrf-naive":

            def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                *whole, _ = resolve_cluster_sizes(q.shape[2], k.shape[2], *sizes)
                if q.shape[2] % whole[0] or k.shape[2] % whole[1]:
                    raise ValueError(f"its clusters of {whole[0]} and {whole[1]} must divide the lengths")
                orders = cluster_orders(q, k, projections, *whole)
                return naive_clustered_attention(q, k, v, *orders, *whole, scale=1.0, merge=merge)

            return naive
        backend = "auto" if name == "smyrf" else name.removeprefix("smyrf-")
        return lambda q, k, v: smyrf_attention(q, k, v, projections, *sizes, scale=1.0, merge=merge, backend=backend)
    torch.manual_seed(1)
    known = {"head_dim": args.head_dim, "num_heads": args.heads, "max_length": length, "scale": 1.0}
    filled = {option: value for option, value in known.items() if option in get_mechanism(name).options}
    return build_attention(name, **filled | options).to(args.device, dtype)


def make_inputs(length: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q (1, H, N, D), k (1, H, Nk, D), v (1, H, Nk, Dv) in float64."""
    generator = torch.Generator().manual_seed(0)
    num_keys, value_dim = (length // 4, 4 * args.head_dim) if args.keys == "quarter" else (length, args.head_dim)
    shapes = ((length, args.head_dim), (num_keys, args.head_dim), (num_keys, value_dim))
    q, k, v = (torch.randn(1, args.heads, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(args.device) for x in (q, k, v))


def run(attend: Attend, inputs: Sequence[Tensor], passes: str) -> None:
    """One forward pass ("f") or one forward and backward pass ("fb")."""
    if passes == "f":
        with torch.no_grad():
            attend(*inputs)
    else:
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.grad(attend(*leaves).float().square().sum(), leaves, allow_unused=True)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def check(name: str, length: int, args: argparse.Namespace) -> tuple[float, float]:
    """Error against what the mechanism should compute, relative to its largest value, and mean error against dense.

    Both over 64 queries for SMYRF and dense attention; the mean error is relative to the mean of the dense output.

    Raises:
        RunError: the first error is beyond rounding.
    """
    exact = make_inputs(length, args)
    rows = torch.arange(0, length, max(1, length // CHECKED_QUERIES), device=exact[0].device)
    dense = torch.softmax(exact[0][:, :, rows] @ exact[1].transpose(-1, -2), -1) @ exact[2]
    dtype = getattr(torch, args.dtype)
    inputs = [x.to(dtype) for x in exact]
    out = build_method(name, length, args, dtype)(*inputs).double()
    if name == "dense":
        found, expected = out[:, :, rows], dense
    elif is_smyrf(name):
        found, expected = out[:, :1, rows], _smyrf_rows(name, rows, length, args, inputs)
    else:
        found, expected = out, build_method(name, length, args, torch.float64)(*(x.double() for x in inputs))
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[args.dtype]:
        raise RunError(f"{name} at {length} tokens is off by {error:.1e} of its largest value: not reported.")
    return error, ((out[:, :, rows] - dense).abs().mean() / dense.abs().mean()).item()


def _smyrf_rows(name: str, rows: Tensor, length: int, args: argparse.Namespace, inputs: list[Tensor]) -> Tensor:
    """Outputs of some queries of the first head in float64, each from its clusters' keys, counted as `merge` counts."""
    options = SMYRF_OPTIONS | args.options.get("smyrf", {})
    generator = torch.Generator().manual_seed(1)
    projections = torch.randn(args.head_dim + 2, options["num_hashes"], generator=generator)
    sizes = options["q_cluster_size"], options["k_cluster_size"]
    q, k, v = inputs
    q_order, k_order = cluster_orders(q, k, projections.to(q.device, q.dtype), *sizes)
    meetings = torch.zeros(len(rows), k.shape[2], dtype=torch.float64, device=q.device)
    for q_round, k_round in zip(q_order[:, 0, 0], k_order[:, 0, 0], strict=True):
        q_cluster, k_cluster = torch.argsort(q_round)[rows] // sizes[0], torch.argsort(k_round) // sizes[1]
        meetings += q_cluster[:, None] == k_cluster
    if options["merge"] == "union":
        meetings.clamp_max_(1)
    q, k, v = (x[0, 0].double() for x in (q, k, v))
    return (torch.softmax(q[rows] @ k.T + meetings.log(), -1) @ v)[None, None]


def measure_memory(name: str, length: int, passes: str, args: argparse.Namespace) -> float:
    """Peak growth of one call in MB; runs in a process of its own."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    options = SMYRF_OPTIONS | args.options.get("smyrf", {})
    small = min(length, options["q_cluster_size"] if is_smyrf(name) else 256)
    warm, full = ([x.to(dtype) for x in make_inputs(n, args)] for n in (small, length))
    calls = [partial(run, build_method(name, n, args, dtype), x, passes) for n, x in ((small, warm), (length, full))]
    return peak_growth_mb(*calls, args.device)


def smyrf_arithmetic_ms(inputs: Sequence[Tensor], passes: str, args: argparse.Namespace) -> float:
    """What SMYRF's products of matrices and exponentials take at the speed that torch computes large ones in here.

    A pair of a query and a key costs 2 (D + Dv) operations and an exponential forward; backward, which forms the scores
    again to keep none, 2 (3 D + 2 Dv) operations and another. Hashing, sorting, gathering, sums and maxima come on top.
    """
    q, k, v = inputs
    options = SMYRF_OPTIONS | args.options.get("smyrf", {})
    cluster = min(options["k_cluster_size"], k.shape[2])  # as SMYRF itself takes a size above the length
    pairs = q.shape[1] * q.shape[2] * options["num_hashes"] * cluster
    (key_dim, value_dim), backward = (q.shape[3], v.shape[3]), passes == "fb"
    operations = 2 * (key_dim + value_dim) + backward * 2 * (3 * key_dim + 2 * value_dim)
    product_seconds, exponential_seconds = seconds_per_operation(q.dtype, args.threads)
    return 1e3 * pairs * (operations * product_seconds + (1 + backward) * exponential_seconds)


def growth(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Exponents of time and memory from each method's shortest length to its longest."""
    found = []
    for method, passes in dict.fromkeys((row["method"], row["pass"]) for row in rows):
        lines = [row for row in rows if (row["method"], row["pass"]) == (method, passes)]
        lines.sort(key=lambda row: row["length"])
        first, last = lines[0], lines[-1]
        if first["length"] == last["length"]:
            continue
        line = {"method": method, "pass": passes, "from": first["length"], "to": last["length"]}
        for quantity in ("median_ms", "peak_growth_mb"):
            if min(first[quantity], last[quantity]) > 0:
                line[f"{quantity}_exponent"] = growth_exponent(first, last, quantity, "length")
        found.append(line)
    return found


def measure(length: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """One row for every method and pass at one length; methods that cannot take this length are named and left out."""
    dtype = getattr(torch, args.dtype)
    checks, methods = {}, {}
    dense = ["dense"] if length <= args.dense_up_to else []
    for name in [*dense, *args.mechanisms]:
        try:
            checks[name] = check(name, length, args)
            methods[name] = build_method(name, length, args, dtype)
        except (RunError, ValueError) as refusal:
            print(f"{name} at {length:,}: {refusal}", file=sys.stderr)
    inputs = [x.to(dtype) for x in make_inputs(length, args)]
    rows = []
    for passes in args.passes:
        calls = {name: partial(run, attend, inputs, passes) for name, attend in methods.items()}
        times = interleave(calls, args.repeats)
        for name, row in summarise_times(times, "dense" if "dense" in times else None).items():
            with multiprocessing.get_context("spawn").Pool(1) as fresh_process:
                memory = fresh_process.apply(measure_memory, (name, length, passes, args))
            error, error_to_dense = checks[name]
            row |= {"peak_growth_mb": round(memory, 1), "check_error": error, "error_to_dense": error_to_dense}
            if is_smyrf(name) and args.device == "cpu":
                row["arithmetic_ms"] = float(f"{smyrf_arithmetic_ms(inputs, passes, args):.4g}")
            rows.append({"method": name, "length": length, "keys": inputs[1].shape[2], "pass": passes} | row)
            print(format_row(rows[-1]), flush=True)
    return rows


def format_row(row: dict[str, object] | None) -> str:
    """A line of the table, or its head."""
    if row is None:
        return (
            f"{'method':16} {'queries x keys':>17} {'pass':>5} {'median ms':>11} {'quartiles':>19} {'/ dense':>8} "
            f"{'peak MB':>9} {'off dense':>9}"
        )
    low, high = row["quartiles_ms"]
    ratio = math.nan if row["time_ratio"] is None else row["time_ratio"]
    return (
        f"{row['method']:16} {row['length']:>8,} x {row['keys']:>6,} {row['pass']:>5} {row['median_ms']:11.1f} "
        f"{low:9.1f}-{high:9.1f} {ratio:8.3f} {row['peak_growth_mb']:9.1f} {row['error_to_dense']:9.1%}"
    )


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.benchmark_attention", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mechanisms", default="smyrf-naive,smyrf", help="names, smyrf-BACKEND, smyrf-naive, or all; beside dense"
    )
    parser.add_argument("--lengths", default="16384", help="numbers of queries, separated by commas")
    parser.add_argument("--keys", default="quarter", choices=("quarter", "equal"), help="keys for each query")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.OPTION=VALUE", help="a mechanism's option")
    parser.add_argument("--head-dim", type=int, default=24, help="head size of queries and keys")
    parser.add_argument("--heads", type=int, default=1, help="heads, all alike")
    parser.add_argument("--dense-up-to", type=int, default=sys.maxsize, help="leave dense attention out beyond")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--passes", default="f,fb", help="f = forward, fb = forward and backward; both: f,fb")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    parser.add_argument("--dtype", default="float32", choices=tuple(TOLERANCE), help="of q, k and v")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="also write the results here")
    parser.add_argument("--plot", type=Path, default=None, metavar="OUT.png", help="draw time over length")
    parser.add_argument(
        "--figure",
        nargs=3,
        type=Path,
        metavar=("LAYERS.json", "SCORES.json", "OUT.png"),
        help="measure nothing: draw score over speed from tools.benchmark_layers and tools.compare_mechanisms",
    )
    args = parser.parse_args(argv)
    open_device(args.device)  # says so where there is none
    args.passes = args.passes.split(",")
    if unknown := set(args.passes) - set(PASS_NAMES):
        parser.error(f"--passes takes f and fb, not {', '.join(sorted(unknown))}")
    try:
        args.lengths = [int(length) for length in args.lengths.split(",")]
        args.options = parse_options(args.set)
    except ValueError as error:
        parser.error(str(error))
    if min(args.lengths) < 8 or min(args.repeats, args.head_dim, args.heads) < 1:
        parser.error("--lengths must be at least 8, --repeats, --head-dim and --heads at least 1")
    everyone = [name for name in available_attention() if name != "dense" and not get_mechanism(name).layer]
    args.mechanisms = everyone if args.mechanisms == "all" else args.mechanisms.split(",")
    known = {*everyone, *(f"smyrf-{backend}" for backend in SMYRF_BACKENDS)}
    if unknown := set(args.mechanisms) - known:
        parser.error(f"no mechanism {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    chosen = {"smyrf" if is_smyrf(name) else name for name in args.mechanisms}
    for name, options in args.options.items():
        if name not in chosen:
            parser.error(f"--set {name}.{min(options)}: {name} is not among the --mechanisms")
        valid = SMYRF_OPTIONS if name == "smyrf" else get_mechanism(name).options
        if unknown := options.keys() - set(valid):
            parser.error(f"--set {name}.{min(unknown)}: the options are {', '.join(valid) or 'none'}")
    return args


def parse_options(pairs: Sequence[str]) -> dict[str, dict[str, object]]:
    """["smyrf.num_hashes=8"] -> {"smyrf": {"num_hashes": 8}}; ValueError for what has another form."""
    options: dict[str, dict[str, object]] = {}
    for pair in pairs:
        name, dot, rest = pair.partition(".")
        option, equals, value = rest.partition("=")
        if not (dot and equals and option and value):
            raise ValueError(f"--set takes NAME.OPTION=VALUE, such as smyrf.num_hashes=8, not {pair}")
        if name not in available_attention():  # all back-ends of SMYRF have the options of smyrf, to be compared
            raise ValueError(f"--set {pair}: no mechanism {name}; there are {', '.join(available_attention())}")
        number = float(value) if value.replace(".", "", 1).isdigit() else math.nan
        parsed = value if math.isnan(number) else int(number) if number.is_integer() else number
        options.setdefault(name, {})[option] = parsed
    return options


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    if args.figure:
        return draw_figure(*args.figure)
    torch.set_num_threads(args.threads)
    machine = describe_machine(args.threads)
    print(format_row(None))
    rows = [row for length in args.lengths for row in measure(length, args)]
    settings = {
        name: getattr(args, name) for name in ("keys", "heads", "head_dim", "repeats", "device", "dtype", "options")
    }
    settings["keep_freed_memory"] = KEEPS_FREED_MEMORY
    record = {"machine": machine, "settings": settings, "results": rows, "growth": growth(rows)}
    for line in record["growth"]:
        print("growth", *(f"{name} {value}" for name, value in line.items()))
    if args.json is not None:
        write_json(args.json, record)
    if args.plot is not None:
        plot_crossover(record, args.plot)


if __name__ == "__main__":
    sys.exit(run_command(main))
