"""SMYRF's clusters of an image's queries and keys, painted over the image, and who meets whom in each round.

    python -m tools.visualize_clusters --checkpoint runs/demo --out clusters.png
    python -m tools.visualize_clusters --checkpoint runs/demo --image face.png --out clusters.png
    python -m tools.visualize_clusters --demo --out clusters.png --attention.hashing rp-tree --attention.transform none

A row of pictures for the queries, one for the keys (half the resolution), and one for the matrix of queries and keys,
both row by row through the image, coloured where the two share a cluster. The last column counts the rounds in which
they do. Colours follow the order of the clusters within a round and mean nothing across rounds. With --demo there is
no network: the colours around a pixel of a drawn face, or of --image, are its query and its key.
"""

from __future__ import annotations

import colorsys
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention import SmyrfAttention
from attention.smyrf.clusters import cluster_orders, inverse_order, resolve_cluster_sizes
from attention.smyrf.hashing import get_hash_family
from biggan.commands.attention_flags import parse_with_options
from biggan.data import draw_face
from runtime.errors import UserError
from runtime.randomness import host_generator
from tools.attention_layers import Layer, add_network_flags, biggan_layers, load_image
from tools.plotting import check_png, pyplot, save

CLUSTERING = ("num_hashes", "q_cluster_size", "k_cluster_size", "transform", "hashing")  # the options that decide it
DEMO_RESOLUTION = 64
ROUNDS_SHOWN = 4


def cluster_labels(order: Tensor, cluster_size: int) -> Tensor:
    """The cluster of every token, int64 (..., N), from `order`, which lists the token of every rank.

    A token's cluster is the run that its *rank* falls into, so that the order has to be inverted first.
    """
    return inverse_order(order) // cluster_size


def find_clusters(layer: Layer, options: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, int]:
    """Clusters of queries (R, Nq) and keys (R, Nk) of the first row and head, and how many there are.

    Args:
        options: of `SmyrfAttention`. Without any, a layer of SMYRF shows the clusters that it used. Rounds and cluster
            sizes are the layer's own where they are not given; for another mechanism 4, and an eighth of the tokens.

    Raises:
        UserError: options that SMYRF does not have or that do not fit.
    """
    q, k, lengths = layer.q, layer.k, (layer.q.shape[2], layer.k.shape[2])
    if isinstance(layer.mechanism, SmyrfAttention):
        known = {name: getattr(layer.mechanism, name) for name in CLUSTERING}
    else:
        known = {"num_hashes": 4, "q_cluster_size": -(-lengths[0] // 8), "k_cluster_size": -(-lengths[1] // 8)}
    try:
        smyrf = SmyrfAttention(**known | options)
        *sizes, num_clusters = resolve_cluster_sizes(*lengths, smyrf.q_cluster_size, smyrf.k_cluster_size)
    except (TypeError, ValueError) as error:
        raise UserError(f"clusters: {error}.") from None
    projections = layer.projections
    if projections is None or options:
        shape = smyrf.projection_shape(*lengths, q.shape[3])
        projections = get_hash_family(smyrf.hashing).draw(shape, generator=host_generator("attention", seed))
    orders = cluster_orders(q, k, projections, *sizes, None, None, smyrf.transform, smyrf.hashing)
    q_labels, k_labels = (cluster_labels(order[:, 0, 0], size) for order, size in zip(orders, sizes, strict=True))
    return q_labels, k_labels, num_clusters


def cluster_colours(num_clusters: int) -> np.ndarray:
    """float64 (num_clusters, 3): hues from red to violet in the order of the clusters."""
    return np.array([colorsys.hsv_to_rgb(0.8 * c / max(num_clusters - 1, 1), 0.85, 0.95) for c in range(num_clusters)])


def paint(image: Tensor, labels: Tensor, num_clusters: int) -> np.ndarray:
    """An image uint8 (3, R, R) under the colours of the clusters of its S x S tokens, int64 (S * S,): (R, R, 3)."""
    side = int(len(labels) ** 0.5)
    colours = cluster_colours(num_clusters)[labels.numpy().reshape(side, side)]  # (S, S, 3)
    scale = image.shape[1] // side
    colours = colours.repeat(scale, axis=0).repeat(scale, axis=1)
    grey = image.float().mean(0).numpy()[..., None] / 255  # the clusters bring the colour
    return 0.35 * grey + 0.65 * colours


def membership(q_labels: Tensor, k_labels: Tensor, num_clusters: int) -> np.ndarray:
    """(Nq, Nk, 3): the colour of the cluster that a query and a key share, white where they share none."""
    shared = q_labels[:, None] == k_labels[None, :]  # (Nq, Nk)
    colours = cluster_colours(num_clusters)[q_labels.numpy()]  # (Nq, 3)
    return np.where(shared.numpy()[..., None], colours[:, None], 1.0)


def draw(image: Tensor, layers: Sequence[tuple[str, Tensor, Tensor, int]], out: Path) -> None:
    """A picture of (title, q_labels (R, Nq), k_labels (R, Nk), number of clusters) for each layer."""
    plt = pyplot()
    rounds = min(ROUNDS_SHOWN, max(len(q_labels) for _, q_labels, _, _ in layers))
    figure, axes = plt.subplots(
        3 * len(layers),
        rounds + 2,
        figsize=(2.3 * (rounds + 2), 7.6 * len(layers)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (title, q_labels, k_labels, num_clusters) in enumerate(layers):
        queries, keys, matrices = axes[3 * row : 3 * row + 3]
        _show(queries[0], image.permute(1, 2, 0).numpy(), f"{title}\n{num_clusters} clusters a round")
        for i in range(min(rounds, len(q_labels))):
            _show(queries[i + 1], paint(image, q_labels[i], num_clusters), f"round {i + 1}: queries")
            _show(keys[i + 1], paint(image, k_labels[i], num_clusters), f"round {i + 1}: keys")
            _show(matrices[i + 1], membership(q_labels[i], k_labels[i], num_clusters), f"round {i + 1}: who meets")
            _label_matrix(matrices[i + 1])
        met = (q_labels[:, :, None] == k_labels[:, None, :]).sum(0)  # (Nq, Nk)
        axis = matrices[-1]
        share = (met > 0).float().mean().item()
        title = f"{len(q_labels)} rounds: how often\n(a query meets {share:.0%} of the keys)"
        drawn = _show(axis, met.numpy(), title)
        _label_matrix(axis)
        figure.colorbar(drawn, ax=axis, shrink=0.8, ticks=range(int(met.max()) + 1))
    save(figure, out)


def _show(axis: Any, pixels: np.ndarray, title: str) -> Any:
    axis.axis("on")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9)
    square = pixels.shape[0] == pixels.shape[1]
    return axis.imshow(pixels, aspect="equal" if square else "auto", cmap="viridis", interpolation="nearest")


def _label_matrix(axis: Any) -> None:
    axis.set_xlabel("keys, row by row", fontsize=8)
    axis.set_ylabel("queries, row by row", fontsize=8)


def demo_layer(arguments: Namespace) -> tuple[Tensor, list[Layer]]:
    """An image (1, 3, R, R), and the colours around its pixels at half the resolution; for keys, means of 2x2."""
    if arguments.image is not None:
        image = load_image(arguments.image, DEMO_RESOLUTION)
    else:
        image = torch.from_numpy(draw_face(arguments.seed, DEMO_RESOLUTION))
    small = F.avg_pool2d(image[None] / 127.5 - 1, 2)  # (1, 3, S, S)
    features = F.unfold(F.pad(small, (1, 1, 1, 1), mode="replicate"), 3).unflatten(2, small.shape[2:])  # (1, 27, S, S)
    q, k = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (features, F.avg_pool2d(features, 2)))
    return image[None], [Layer("neighbourhoods", torch.nn.Identity(), q, k, small.shape[2], None, torch.nn.Identity())]


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m tools.visualize_clusters", description=__doc__.splitlines()[0])
    sources = add_network_flags(parser)
    sources.add_argument("--demo", action="store_true", help="no network: cluster the colours of an image")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, NAME.png")
    arguments, options = parse_with_options(parser, argv)
    check_png(arguments.out)
    if arguments.seed < 0:
        raise UserError("--seed must be at least 0.")
    images, layers = demo_layer(arguments) if arguments.demo else biggan_layers(arguments)
    drawn = [(layer.name, *find_clusters(layer, options, arguments.seed)) for layer in layers]
    draw(images[0], drawn, arguments.out)
    print(f"{len(drawn)} layer(s): {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
