"""The command `biggan`; also `python -m biggan`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from runtime.cli import run_command, unknown_flag_message
from runtime.errors import UserError

COMMANDS = {
    "train": "train a generator and a discriminator, or resume",
    "sample": "draw images, grids and interpolations from a checkpoint",
    "evaluate": "measure samples against data: FID, sliced Wasserstein distance",
    "export": "write a checkpoint's generator as safetensors",
}
HELP = "usage: biggan COMMAND [--help]\n\nBigGAN with SMYRF attention.\n\ncommands:\n" + "".join(
    f"  {name:<10} {text}\n" for name, text in COMMANDS.items()
)


def dispatch(argv: Sequence[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"{unknown_flag_message(argv[0], list(COMMANDS))}. Commands are {', '.join(COMMANDS)}.")
    return importlib.import_module(f"biggan.commands.{argv[0]}").main(argv[1:])  # only what is used is imported


def main() -> int:
    return run_command(dispatch)


if __name__ == "__main__":
    sys.exit(main())
