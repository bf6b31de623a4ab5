"""`biggan export`: the generator of a checkpoint as one safetensors file, which `biggan sample` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from biggan.checkpoints import export
from runtime.cli import CommandParser
from runtime.errors import UserError


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="biggan export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint or a run directory")
    parser.add_argument("--out", type=Path, required=True, help="file to write, NAME.safetensors")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw weights")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out {arguments.out}: the name must end in .safetensors.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    export(arguments.checkpoint, arguments.out, arguments.weights)
    print(f"{arguments.weights} generator: {arguments.out}")
