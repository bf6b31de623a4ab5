"""A map over processes that keeps the order and stays only a little ahead of its consumer."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from runtime.errors import RunError

Item, Result = TypeVar("Item"), TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int = 64
) -> Iterator[Result]:
    """`map(function, items)`, computed by processes. `items` may be endless: stop consuming, and the work stops.

    Args:
        function: a function of a module, or a `functools.partial` of one.
        workers: processes; 1 computes in this one.
        chunk: items a process takes at a time.

    Raises:
        RunError: a process died (out of memory, most likely). What `function` raises is raised here.
    """
    if workers == 1:
        yield from map(function, items)
        return
    items = iter(items)
    # Forked where that exists: what is loaded need not be loaded again, and callers need no __main__ guard.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method))
    try:
        ahead: deque = deque()
        while taken := list(islice(items, chunk)):
            ahead.append(pool.submit(_map_chunk, function, taken))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    except BrokenProcessPool:
        raise RunError("a worker process died; was the memory full? Try fewer workers.") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _map_chunk(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]
