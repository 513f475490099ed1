"""A thread for every tracker, so that a slow or broken tracker cannot slow or stop a run."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from flowgrain.training.trackers.base import Tracker

log = logging.getLogger(__name__)

Task = Callable[[Tracker], None]
"""Logs one record."""

PENDING = 1000
"""Records that may wait for a tracker."""
CLOSE_SECONDS = 300.0
"""Longest time that the end of a run waits for a tracker."""


class Worker:
    """Opens a tracker and passes records to it, in a thread.

    A tracker is switched off with one warning if it raises an error, if too many records wait for
    it, or if it does not end in time.

    Args:
        name: name of the tracker.
        opened: opens the tracker.
    """

    def __init__(self, name: str, opened: Callable[[], Tracker]) -> None:
        self.name = name
        self._open = opened
        self._tasks: queue.Queue[Task | None] = queue.Queue(PENDING)
        self._off = threading.Event()
        # A daemon: a library that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Let the thread run `task` on the tracker. Returns at once."""
        if self._off.is_set():
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._switch_off(f"it is {PENDING} records behind")
        if self._off.is_set():  # the thread may have switched it off at the same time
            self._drain()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait until the tracker has written all records, at most for `seconds`."""
        end = time.monotonic() + seconds
        try:
            self._tasks.put(None, timeout=seconds if not self._off.is_set() else 0)
            self._thread.join(max(end - time.monotonic(), 0) if not self._off.is_set() else 0)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._switch_off(f"it did not end within {seconds:g} seconds")

    def _run(self) -> None:
        try:
            tracker = self._open()
            try:
                while (task := self._tasks.get()) is not None and not self._off.is_set():
                    task(tracker)
            finally:
                tracker.close()
        except BaseException as error:  # a library may raise SystemExit, too
            self._switch_off(f"{type(error).__name__}: {error}")

    def _switch_off(self, reason: str) -> None:
        if not self._off.is_set():
            self._off.set()
            log.warning(
                "runtime.trackers: %s is switched off (%s). The run goes on, and its directory "
                "has all records.",
                self.name,
                reason,
            )
            self._drain()

    def _drain(self) -> None:
        """Drop the waiting records, which have images, and let the thread end."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        with contextlib.suppress(queue.Full):  # then the thread gets a record, and ends as well
            self._tasks.put_nowait(None)
