"""The command `biggan`; also `python -m biggan`."""

from __future__ import annotations

import sys

from runtime.cli import dispatcher, run_command

COMMANDS = {
    "train": "train a generator and a discriminator, or resume",
    "sample": "draw images, grids and interpolations from a checkpoint",
    "evaluate": "measure samples against data: FID, KID, Inception Score, precision and recall, SWD",
    "export": "write a checkpoint's generator as safetensors",
}
dispatch = dispatcher("biggan", "BigGAN with SMYRF attention.", COMMANDS)


def main() -> int:
    return run_command(dispatch)


if __name__ == "__main__":
    sys.exit(main())
