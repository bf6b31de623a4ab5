"""Error of SMYRF attention against dense attention, over compute: rounds, cluster sizes, transforms, hashes, merges.

    python -m tools.attention_quality --out benchmarks/attention_quality
    python -m tools.attention_quality --checkpoint runs/faces64 --out benchmarks/attention_quality

Compute is the number of scores as a share of dense attention's, num_hashes * k_cluster_size / keys. Error is the mean
absolute difference of the outputs, over seeds of the hash directions, as a share of the mean absolute dense output.
Inputs are Gaussian q, k, v (D 24, scale 1); the same drawn around 32 centres; and, with a checkpoint of `biggan`, what
its generator's attention sees. Written are OUT.json, every point, and OUT.png, the lowest error up to each compute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import torch
from torch import Tensor
from tqdm import tqdm

from attention import SmyrfAttention, clustered_attention, dense_attention
from attention.smyrf.clusters import cluster_orders, inverse_order
from attention.smyrf.transforms import TRANSFORMS
from biggan.checkpoints import load_generator
from runtime.errors import UserError

HASHINGS = {  # label: transform and hash family that go together
    "random": ("none", "random"),
    "e2lsh": ("xbox+", "e2lsh"),
    "orthogonal": ("none", "orthogonal"),
    "rp-tree": ("none", "rp-tree"),
    "voronoi": ("l2lsh", "voronoi"),
    "cross-polytope": ("l2lsh", "cross-polytope"),
}
ROUNDS = (1, 2, 4, 8, 16)
CLUSTERS = (2, 4, 8, 16, 32)
MERGES = ("multiset", "union")


@dataclass(frozen=True)
class Inputs:
    """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv) and what dense attention makes of them."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def dense(self) -> Tensor:
        return dense_attention(self.q, self.k, self.v, self.scale)


@dataclass(frozen=True)
class Point:
    """One setting. `covered` is the share of the dense softmax's mass on keys that a query meets."""

    inputs: str
    transform: str
    hashing: str
    merge: str
    num_hashes: int
    num_clusters: int
    compute: float
    covered: float
    error: float


def drawn_inputs(num_queries: int, num_keys: int, head_dim: int = 24, value_dim: int = 96) -> list[Inputs]:
    """Gaussian q, k, v; and q, k as 32 Gaussian clouds of half the spread, v Gaussian."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lengths = (num_queries, num_keys)
    gaussian = [normal(1, 1, n, head_dim) for n in lengths]
    centres = normal(32, head_dim)
    clouds = [
        (0.9 * centres[torch.randint(32, (n,), generator=generator)] + 0.5 * normal(n, head_dim))[None, None]
        for n in lengths
    ]
    v = normal(1, 1, num_keys, value_dim)
    return [Inputs("gaussian", *gaussian, v, 1.0), Inputs("32 clouds", *clouds, v, 1.0)]


@torch.no_grad()
def checkpoint_inputs(path: Path) -> list[Inputs]:
    """What every SMYRF attention of a trained generator sees for two images."""
    generator, config = load_generator(path, weights="raw")
    seen: list[Inputs] = []

    def remember(module: SmyrfAttention, tensors: tuple[Tensor, ...]) -> None:
        q, k, v = tensors[:3]
        name = f"{config.preset}, {q.shape[2]} x {k.shape[2]}, D {q.shape[3]}"
        seen.append(Inputs(name, q, k, v, q.shape[3] ** -0.5 if module.scale is None else module.scale))

    for module in generator.modules():
        if isinstance(module, SmyrfAttention):
            module.register_forward_pre_hook(remember)
    z = torch.randn(2, config.model.dim_z, generator=torch.Generator().manual_seed(0))
    generator(z, torch.zeros(2, dtype=torch.int64))
    if not seen:
        raise UserError(f"the generator in {path} has no SMYRF attention.")
    return seen


def orders(inputs: Inputs, transform: str, hashing: str, num_hashes: int, num_clusters: int, seed: int) -> Any:
    """q_order and k_order for one draw of the directions."""
    lengths = inputs.q.shape[2], inputs.k.shape[2]
    torch.manual_seed(seed)
    if hashing == "random":
        return tuple(torch.rand(num_hashes, *inputs.q.shape[:2], n).argsort(-1) for n in lengths)
    sizes = [length // num_clusters for length in lengths]
    module = SmyrfAttention(num_hashes, *sizes, transform=transform, hashing=hashing)
    directions = module.draw_projections(inputs.q, inputs.k)
    return cluster_orders(inputs.q, inputs.k, directions, *sizes, None, None, transform, hashing)


def covered_mass(inputs: Inputs, q_order: Tensor, k_order: Tensor, num_clusters: int) -> float:
    """Share of the dense softmax's mass on pairs that meet."""
    q_ids, k_ids = (inverse_order(order) // (order.shape[-1] // num_clusters) for order in (q_order, k_order))
    met = torch.zeros(*q_ids.shape[1:], k_ids.shape[-1], dtype=torch.bool)
    for q_round, k_round in zip(q_ids, k_ids, strict=True):
        met |= q_round[..., :, None] == k_round[..., None, :]
    weights = torch.softmax(inputs.scale * inputs.q @ inputs.k.transpose(-1, -2), dim=-1)
    return (weights * met).sum(-1).mean().item()


def settings(inputs: Inputs) -> Iterator[tuple[int, int]]:
    """(num_hashes, num_clusters) that cost at most twice dense attention's scores."""
    return (
        (num_hashes, num_clusters)
        for num_clusters in CLUSTERS
        for num_hashes in ROUNDS
        if num_hashes <= 2 * num_clusters and inputs.k.shape[2] >= 4 * num_clusters
    )


@torch.no_grad()
def measure(
    inputs: Inputs, transform: str, hashing: str, num_hashes: int, num_clusters: int, seeds: int
) -> list[Point]:
    """A point for each merge."""
    dense = inputs.dense()
    sizes = inputs.q.shape[2] // num_clusters, inputs.k.shape[2] // num_clusters
    errors: dict[str, list[float]] = {merge: [] for merge in MERGES}
    covered = []
    for seed in range(seeds):
        clusters = orders(inputs, transform, hashing, num_hashes, num_clusters, seed)
        covered.append(covered_mass(inputs, *clusters, num_clusters))
        for merge in MERGES:
            out = clustered_attention(inputs.q, inputs.k, inputs.v, *clusters, *sizes, inputs.scale, merge=merge)
            errors[merge].append(((out - dense).abs().mean() / dense.abs().mean()).item())
    setting = (num_hashes, num_clusters, num_hashes / num_clusters, sum(covered) / seeds)
    return [Point(inputs.name, transform, hashing, merge, *setting, sum(errors[merge]) / seeds) for merge in MERGES]


def write(path: Path, record: Mapping[str, Any], points: Sequence[Point]) -> None:
    """JSON with a line for each point, in the order of `columns`."""
    columns = [field.name for field in fields(Point)]
    rows = [json.dumps([round(x, 5) if isinstance(x, float) else x for x in astuple(point)]) for point in points]
    head = json.dumps(dict(record) | {"columns": columns}, indent=2).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + ',\n  "points": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n")


def lowest(points: Sequence[Point]) -> list[tuple[float, float]]:
    """(compute, error) of the points that no cheaper point beats, by compute."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point.compute, point.error)):
        if not front or point.error < front[-1][1]:
            front.append((point.compute, point.error))
    return front


def plot(points: Sequence[Point], out: Path) -> None:
    """A column for each inputs; above hash families with both merges, below transforms under e2lsh."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plot needs matplotlib; install it with: pip install '.[dev]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(point.inputs for point in points))
    figure, axes = plt.subplots(2, len(names), figsize=(5 * len(names), 8), squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        lines = [
            (axes[0][column], f"{label}, {merge}", color, name, merge, transform, hashing)
            for color, (label, (transform, hashing)) in enumerate(HASHINGS.items())
            for merge in MERGES
        ]
        lines += [
            (axes[1][column], transform, color, name, "union", transform, "e2lsh")
            for color, transform in enumerate(TRANSFORMS)
        ]
        for axis, label, color, *setting in lines:
            own = [point for point in points if [point.inputs, point.merge, point.transform, point.hashing] == setting]
            style = {"color": f"C{color}", "linestyle": "--" if setting[1] == "multiset" else "-", "marker": "."}
            axis.plot(*zip(*lowest(own), strict=True), label=label, **style)
        axes[0][column].set_title(name)
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log", xlabel="scores, share of dense attention's", ylabel="relative error")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    axes[1][0].legend(title="transform, with e2lsh and union", fontsize="small")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m tools.attention_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png are written")
    parser.add_argument("--checkpoint", type=Path, help="of biggan: a file or a run directory, with SMYRF attention")
    parser.add_argument("--q-length", type=int, default=4096, help="drawn queries")
    parser.add_argument("--k-length", type=int, default=1024, help="drawn keys")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the hash directions")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.q_length % max(CLUSTERS) or args.k_length % max(CLUSTERS):
        parser.error(f"lengths must be multiples of {max(CLUSTERS)}, and there must be a seed")
    everything = drawn_inputs(args.q_length, args.k_length)
    everything += checkpoint_inputs(args.checkpoint) if args.checkpoint is not None else []
    methods = [*HASHINGS.values(), *((transform, "e2lsh") for transform in TRANSFORMS if transform != "xbox+")]
    tasks = [(inputs, *method, *setting) for inputs in everything for method in methods for setting in settings(inputs)]
    points = [point for task in tqdm(tasks, unit="setting") for point in measure(*task, args.seeds)]
    sizes = {inputs.name: [list(x.shape) for x in (inputs.q, inputs.k, inputs.v)] for inputs in everything}
    record = {"seeds": args.seeds, "torch": torch.__version__, "shapes of q, k, v": sizes}
    write(args.out.with_suffix(".json"), record, points)
    plot(points, args.out.with_suffix(".png"))
    print(f"wrote {args.out.with_suffix('.json')} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run_command(main))
