"""Progress of long commands: a bar on a terminal, otherwise a line every half minute."""

import time
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flowgrain.cli.app import err, note
from flowgrain.units import duration

INTERVAL = 30.0
"""Seconds between two lines of progress without a terminal."""


class ProgressDisplay:
    """Shows how much of some work is done.

    Args:
        name: name of a part of the work, such as "step".
        done: parts that are already done. None: not known before the first part.
        total: number of parts. It may be given later, with `show`.
    """

    def __init__(self, name: str, done: int | None = 0, total: int | None = None) -> None:
        self.name, self.first, self.done, self.total = name, done, done or 0, total
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=err, disable=not err.is_terminal)
        self.task = self.bar.add_task("", total=total, completed=self.done)
        self.begin = time.monotonic()
        self.printed: float | None = None

    def __enter__(self) -> "ProgressDisplay":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int, total: int | None = None, text: str = "") -> None:
        """Show that `done` parts are done.

        Without a terminal, the first part, the last part, and one part every `INTERVAL` seconds are
        printed.
        """
        self.first = done - 1 if self.first is None else self.first
        self.done, self.total = done, self.total if total is None else total
        self.bar.update(self.task, completed=done, total=self.total, description=text)
        if err.is_terminal:
            return
        now = time.monotonic()
        last = self.total is not None and done >= self.total
        if self.printed is None or last or now - self.printed >= INTERVAL:
            self.printed = now
            note(self._line(now - self.begin, text))

    def _line(self, seconds: float, text: str) -> str:
        """A line with the number of parts, `text` and the time left."""
        of_total = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        parts = [f"{self.name} {of_total}", *([text] if text else [])]
        new = self.done - (self.first or 0)
        if self.total is not None and new > 0 and self.done < self.total:
            parts.append(f"{duration(seconds / new * (self.total - self.done))} left")
        return ", ".join(parts)


def step_text(metrics: dict[str, Any]) -> str:
    """The rewards of a training step, and its forward passes per second."""
    rewards = [
        f"{name.removeprefix('reward/')} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith("reward/")
    ]
    rate = metrics["forward_passes"] / metrics["seconds"]
    return ", ".join([*rewards, f"{rate:,.0f} passes/s"])
