"""`--attention NAME` and its options: a checkpoint's network with another mechanism than it was trained with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention import available_attention
from biggan.checkpoints import read
from biggan.config import AttentionConfig
from runtime.cli import CommandParser, unknown_flag_message
from runtime.config import split_open_flags


def add_attention_flag(parser: CommandParser) -> None:
    """`--attention NAME`, and the options of `parse_with_options`: another mechanism than the checkpoint's."""
    parser.add_argument(
        "--attention",
        default="keep",
        metavar="NAME",
        help=f"keep, or replace the mechanism: {', '.join(available_attention())}; with its options as "
        "--attention.num-hashes 4",
    )


def parse_with_options(parser: CommandParser, argv: Sequence[str]) -> tuple[Namespace, dict[str, Any]]:
    """The arguments, and the options of the mechanism that were given as --attention.NAME VALUE."""
    arguments, rest = parser.parse_known_args(argv)
    options, unknown = split_open_flags(rest, "--attention")
    if unknown:
        parser.error(unknown_flag_message(unknown[0], [flag for a in parser._actions for flag in a.option_strings]))
    return arguments, options


def choose_attention(path: Path, name: str, options: dict[str, Any]) -> AttentionConfig | None:
    """The mechanism to sample with; None keeps the checkpoint's. Options without a name change the checkpoint's own."""
    if name == "keep" and not options:
        return None
    own = read(path)[0].attention
    if name in ("keep", own.name):
        return AttentionConfig(own.name, options=own.options | options)
    return AttentionConfig(name, options=options)
