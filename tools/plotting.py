"""What the tools that draw share: matplotlib on demand, and PNG files written whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from runtime.checkpoint import write_atomically
from runtime.errors import UserError


def pyplot() -> Any:
    """matplotlib.pyplot without a window; UserError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; install it with: pip install '.[dev]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def check_png(path: Path) -> None:
    """UserError unless a picture can be written under this name; ask before any work is done."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: the name must end in .png.")
    pyplot()


def save(figure: Any, path: Path, dpi: int = 100) -> None:
    """Writes a figure as PNG, in a folder that is made where it is missing, and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    pyplot().close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
