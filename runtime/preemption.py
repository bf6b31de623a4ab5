"""SIGTERM and Ctrl-C ask a run to stop: it finishes its step, saves and exits in order.

Of several processes only some may be asked; `Processes.any` lets all stop at the same step.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

SAME_KEYPRESS_SEC = 1.0  # torchrun passes on a Ctrl-C that the terminal has sent to its processes already


class StopRequest:
    """Truthy once the process was asked to stop. A second Ctrl-C, a second later, interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._requested_at > SAME_KEYPRESS_SEC:
            raise KeyboardInterrupt
        self.requested, self._requested_at = True, now
