"""Packs images in any format into one file that opens at once: decoded, square, of one size.

python -m tools.prepare_images ~/CelebAMask-HQ celebahq128.safetensors --size 128

Killed at any time, the same command goes on where it was: biggan/data/resumable.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from biggan.data.decoding import MAX_DAMAGED_FRACTION
from biggan.data.packed import SUFFIX, PackedSource, read_packed
from biggan.data.resumable import pack
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
    parser.add_argument("source", type=Path, help="folder, zip, tar, HDF5, LMDB, Parquet or packed file")
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
    done = pack(options.out, source, options.size, options.workers, max_damaged_fraction=options.max_damaged_fraction)
    packed = read_packed(options.out)
    if (len(packed), packed.resolution) != (len(done.labels), options.size):
        raise OSError(f"{options.out} has {len(packed):,} images where {len(done.labels):,} were written")
    classes = f"{packed.num_classes} classes" if packed.num_classes > 1 else "one class"
    print(f"{options.out}: {len(packed):,} images of {options.size} x {options.size}, {classes}")
    counts = f"{done.records:,} records = {len(done.labels):,} written + {len(done.damaged):,} damaged"
    print(counts + (f"; the first {done.continued_from:,} by an earlier run" if done.continued_from else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
