"""SIGINT and SIGTERM ask a run to stop after the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopSignal:
    """Remembers the first SIGINT or SIGTERM. A second signal acts as usual."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle signals inside this context.

        Outside the main thread, signals are left to the caller.
        """
        self.number = None
        previous: dict[int, Any] = {}

        def remember(number: int, _frame: FrameType | None) -> None:
            self.number = number
            for signal_number, handler in previous.items():
                signal.signal(signal_number, handler)

        try:
            for stop in (signal.SIGINT, signal.SIGTERM):
                previous[stop] = signal.signal(stop, remember)
        except ValueError:  # not the main thread
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
