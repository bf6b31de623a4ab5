"""Packs a folder or zip of images into one file that opens at once: decoded, square, of one size.

python -m tools.prepare_images ~/CelebAMask-HQ celebahq128.safetensors --size 128
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from biggan.data.loading import MAX_DAMAGED_FRACTION, write_decoded
from biggan.data.packed import SUFFIX, PackedSource, read_packed
from biggan.data.sources import open_source
from runtime.cli import CommandParser, run_command
from runtime.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
        UserError: what `open_images` raises, or an output name or size that cannot be.
    """
    parser = CommandParser(
        prog="python -m tools.prepare_images",
        description=f"Decode images once and pack them into one {SUFFIX} file for biggan train --data.",
    )
    parser.add_argument("source", type=Path, help="folder of images, zip of such, or packed file")
    parser.add_argument("out", type=Path, help=f"file to write; its name ends in {SUFFIX}")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--workers", type=int, default=None, help="decoding threads; None is one a core")
    parser.add_argument(
        "--max-damaged-fraction", type=float, default=MAX_DAMAGED_FRACTION, help="stop when more images are damaged"
    )
    options = parser.parse_args(argv)
    if options.out.suffix != SUFFIX:
        raise UserError(f"the packed file must be named something{SUFFIX}, not {options.out}")
    if options.size < 1:
        raise UserError(f"--size must be at least 1, got {options.size}")

    source = open_source(options.source.expanduser())
    if isinstance(source, PackedSource):
        source.check_resolution(options.size)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = write_decoded(
        options.out, source, options.size, options.workers, max_damaged_fraction=options.max_damaged_fraction
    )
    packed = read_packed(options.out)
    if len(packed) != written:
        raise OSError(f"{options.out} has {len(packed):,} images where {written:,} were written")
    classes = f"{packed.num_classes} classes" if packed.num_classes > 1 else "one class"
    print(f"{options.out}: {written:,} images of {options.size} x {options.size}, {classes}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
