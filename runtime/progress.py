"""Progress over a loop of known length: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 10


def track(items: Iterable[T], total: int, description: str, enabled: bool = True) -> Iterator[T]:
    """Yields the items, and says on stderr how many of `total` are done."""
    if not enabled:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=description, dynamic_ncols=True)
    else:
        started = said = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - said >= _SECONDS_BETWEEN_LINES:
                print(f"{description}: {done:,} of {total:,}, {now - started:.0f} s", file=sys.stderr, flush=True)
                said = now
