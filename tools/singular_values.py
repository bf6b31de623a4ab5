"""Singular values of attention maps, and the rank that holds 90% and 99% of their energy.

    python -m tools.singular_values --checkpoint runs/demo --out spectra.png
    python -m tools.singular_values --hrrformer runs/listops-demo-dense --out spectra.png
    python -m tools.singular_values --transformers FOLDER_OR_HUB_NAME --text article.txt --tokens 256 --out spectra.png

Maps are the weights of every query on every key, of each head and of several images or sequences. Energy is the sum of
the squared singular values. A low rank is what approximations of attention live on; Daras et al. 2020,
arXiv:2010.05315, show the same picture for a pretrained BigGAN. HRR attention gives a token its own value, weighted:
its map is diagonal, and its singular values are the weights.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import torch
from torch import Tensor

from attention import get_mechanism, smyrf_attention
from biggan.commands.attention_flags import add_attention_flag, choose_attention, parse_with_options
from hrrformer.checkpoints import load_classifier
from hrrformer.run_setup import fit_to_data, open_data
from runtime.errors import UserError
from tools.attention_layers import (
    add_network_flags,
    biggan_layers,
    recorded,
)
from tools.plotting import check_png, pyplot, save

ENERGIES = (0.9, 0.99)


def spectra(maps: Tensor) -> Tensor:
    """Singular values, largest first: (..., Nq, Nk) -> (M, min(Nq, Nk)) for all M matrices."""
    return torch.linalg.svdvals(maps.flatten(0, -3).double())


def rank_of_energy(values: Tensor, share: float) -> Tensor:
    """The least rank whose squares are at least `share` of all: values (M, N), largest first -> int64 (M,)."""
    energy = values.square().cumsum(-1)
    return (energy < share * energy[:, -1:]).sum(-1) + 1


def summary(values: Tensor) -> str:
    """'of 256: 90% at 4 (2 to 9), 99% at 31 (20 to 44)': medians and ranges over the maps."""
    ranks = [rank_of_energy(values, share) for share in ENERGIES]
    parts = [
        f"{share:.0%} at {int(rank.median())} ({int(rank.min())} to {int(rank.max())})"
        for share, rank in zip(ENERGIES, ranks, strict=True)
    ]
    return f"of {values.shape[1]}: {', '.join(parts)}"


def biggan_spectra(arguments: Namespace, options: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    attention = choose_attention(arguments.checkpoint, arguments.attention, options)
    _, layers = biggan_layers(arguments, attention, arguments.num)
    for layer in layers:
        yield f"{layer.name}, {layer.mechanism.name}", spectra(layer.map())


@torch.no_grad()
def hrrformer_spectra(arguments: Namespace) -> Iterator[tuple[str, Tensor]]:
    """Of the first examples of the task's test data."""
    classifier, config, _, _ = load_classifier(arguments.hrrformer)
    name = config.attention.name
    if get_mechanism(name).layer:
        raise UserError(f"{name} attention mixes tokens without queries and keys; it has no map of this kind.")
    data = open_data(config)
    fit_to_data(config, data)
    tokens = data.test.rows(torch.arange(min(arguments.num, len(data.test))), config.model.max_length)
    if config.model.dual_input:
        tokens = tokens.flatten(0, 1)
    if name == "hrr":
        for i, weights in enumerate(classifier.attention_weights(tokens)):  # (B, H, N)
            yield f"layer {i + 1}, hrr", weights.flatten(0, 1).double().sort(descending=True).values
        return
    with recorded(
        {f"layer {i + 1}": (part.attention.attention, 0) for i, part in enumerate(classifier.layers)}
    ) as seen:
        classifier.encode(tokens)
    for layer in seen:
        yield f"{layer.name}, {name}", spectra(layer.map())


@torch.no_grad()
def transformers_spectra(arguments: Namespace) -> Iterator[tuple[str, Tensor]]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise UserError("--transformers needs transformers; install it with: pip install '.[huggingface]'") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.transformers)
        model = AutoModel.from_pretrained(arguments.transformers, attn_implementation="eager").eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--transformers {arguments.transformers}: {str(error).splitlines()[0]}") from None
    try:
        text = arguments.text.read_text(encoding="utf-8") if arguments.text else smyrf_attention.__doc__
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--text {arguments.text}: no file with text.") from None
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    limit = getattr(model.config, "max_position_embeddings", arguments.tokens)
    length = min(arguments.tokens, limit, tokenizer.model_max_length)
    inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
    attentions = model(**inputs, output_attentions=True).attentions  # of each layer, (1, H, N, N)
    if not attentions:
        raise UserError(f"--transformers {arguments.transformers}: this model returns no attention maps.")
    for i, weights in enumerate(attentions):
        yield f"layer {i + 1}", spectra(weights)


def draw(spectra_of: Sequence[tuple[str, Tensor]], title: str, out: Path) -> None:
    """Singular values over the largest, and the energy that the first ones hold; lines are means over the maps."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for i, (name, values) in enumerate(spectra_of):
        style = {"label": f"{name}, {summary(values)}", "color": plt.get_cmap("viridis")(i / len(spectra_of))}
        ranks = torch.arange(1, values.shape[1] + 1)
        energy = values.square().cumsum(-1)
        left.plot(ranks, (values / values[:, :1]).mean(0).clamp_min(1e-8), **style)
        right.plot(ranks, (energy / energy[:, -1:]).mean(0), **style)
    for share in ENERGIES:
        right.axhline(share, color="grey", linestyle=":")
        right.annotate(f"{share:.0%}", (1, share), color="grey", va="bottom")
    left.set(yscale="log", ylim=(1e-5, 1.5), xlabel="number", ylabel="singular value, share of the largest")
    right.set(xscale="log", ylim=(None, 1.01), xlabel="rank", ylabel="share of the energy")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(fontsize=7, loc="lower right", title="median rank (least to most)", title_fontsize=7)
    figure.suptitle(title)
    save(figure, out, dpi=110)


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m tools.singular_values", description=__doc__.splitlines()[0])
    sources = add_network_flags(parser)
    sources.add_argument("--hrrformer", type=Path, metavar="PATH", help="a checkpoint or a run directory")
    sources.add_argument("--transformers", metavar="NAME", help="a model of the transformers library: folder or name")
    add_attention_flag(parser)
    parser.add_argument("--num", type=int, default=4, help="images of a BigGAN, or sequences of a task")
    parser.add_argument("--text", type=Path, help="file that a transformers model reads (default: a page of English)")
    parser.add_argument("--tokens", type=int, default=256, help="at most so many tokens of the text")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, NAME.png")
    arguments, options = parse_with_options(parser, argv)
    check_png(arguments.out)
    if min(arguments.num, arguments.tokens) < 1:
        raise UserError("--num and --tokens must be at least 1.")
    if arguments.checkpoint is None and (options or arguments.attention != "keep"):
        raise UserError("--attention is for --checkpoint alone.")
    if arguments.checkpoint is not None:
        source, found = arguments.checkpoint, biggan_spectra(arguments, options)
    elif arguments.hrrformer is not None:
        source, found = arguments.hrrformer, hrrformer_spectra(arguments)
    else:
        source, found = arguments.transformers, transformers_spectra(arguments)
    drawn = list(found)
    for name, values in drawn:
        print(f"{name}, {len(values)} map(s) {summary(values)}")
    draw(drawn, f"Attention maps of {Path(*Path(source).parts[-2:])}", arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
