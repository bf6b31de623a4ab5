"""Converts weights of BigGAN-PyTorch and of SMYRF's trainers into a checkpoint that the `biggan` commands take.

    python -m tools.convert_biggan CHECKPOINT_DIR OUT.pt [--suffix copy0]

The folder holds G.pth, G_ema.pth, D.pth, G_optim.pth, D_optim.pth and state_dict.pth; G.pth or G_ema.pth is needed, the
others may be missing. The architecture is read off the shapes of the tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from biggan.checkpoints import save_converted
from biggan.conversion import convert_original
from runtime.cli import CommandParser, run_command


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m tools.convert_biggan", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", metavar="CHECKPOINT_DIR", type=Path, help="folder with G.pth, D.pth and so on")
    parser.add_argument("out", metavar="OUT", type=Path, help="the checkpoint to write")
    parser.add_argument("--suffix", help="which of several copies in the folder: copy0, best1, ...")
    arguments = parser.parse_args(argv)

    converted = convert_original(arguments.directory, arguments.suffix)
    for name in converted["missing"]:
        print(f"{name} is missing")
    model, attention = converted["model"], converted["attention"]
    print(
        f"{model['resolution']} pixels, {model['num_classes']} class(es), widths {model['generator_channels']} (G) and "
        f"{model['discriminator_channels']} (D), attention at {_list(attention['generator_resolutions'])} (G) and "
        f"{_list(attention['discriminator_resolutions'])} (D), {converted['step']} steps"
    )
    save_converted(arguments.out, converted)
    print(f"wrote {arguments.out}; try: biggan sample --checkpoint {arguments.out}")


def _list(resolutions: Sequence[int]) -> str:
    return ", ".join(map(str, resolutions)) or "no resolution"


if __name__ == "__main__":
    sys.exit(run_command(main))
