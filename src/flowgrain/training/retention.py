"""Which recorded training steps stay on the disk."""

from collections.abc import Iterable, Mapping
from typing import Any

_EVALUATED = 64
"""Levels of evaluated steps start here. No step number has as many factors of two."""
_FIRST = 128
"""Level of the first step."""


class Retention:
    """Chooses the recorded steps that are kept within a number of steps and of bytes.

    Every step has a level, and the steps of the lowest levels are deleted first. The level of a
    step is its number of factors of two, so that the kept steps are multiples of a stride that
    doubles. Evaluated steps have higher levels, the first step has the highest. The latest step is
    always kept.

    The choice depends only on the sizes of all steps so far, not on the files of the directory.
    A resumed run, which may have deleted more, therefore ends with the same files. If it evaluates
    other steps than before, levels change, and only the steps that still have files count.

    Args:
        steps: largest number of kept steps.
        max_bytes: largest total size of kept steps.
        every: steps between evaluations. None or 0: no step is evaluated.
    """

    def __init__(self, steps: int, max_bytes: int, every: int | None) -> None:
        self.steps, self.max_bytes, self.every = steps, max_bytes, every
        self._totals: dict[int, tuple[int, int]] = {}  # number and bytes of all steps by level

    def add(self, step: int, size: int) -> None:
        """Count a recorded step of `size` bytes, the latest one."""
        level = self.level(step)
        count, total = self._totals.get(level, (0, 0))
        self._totals[level] = count + 1, total + size
        self._latest = step, size

    def dropped(self, steps: Iterable[int]) -> list[int]:
        """The steps among `steps` that are not kept. Call it after `add`."""
        threshold = self._threshold()
        return [s for s in steps if s != self._latest[0] and self.level(s) < threshold]

    def level(self, step: int) -> int:
        """The level of a step."""
        if step == 1:
            return _FIRST
        if self.every and step % self.every == 0:
            return _EVALUATED + _factors_of_two(step // self.every)
        return _factors_of_two(step)

    def _threshold(self) -> int:
        """The lowest level of which all steps are kept."""
        step, size = self._latest
        for threshold in (0, *(level + 1 for level in sorted(self._totals))):
            kept = [total for level, total in self._totals.items() if level >= threshold]
            if self.level(step) < threshold:
                kept.append((1, size))
            count, total = (sum(column) for column in zip(*kept, strict=True))
            if count <= self.steps and total <= self.max_bytes:
                return threshold
        return _FIRST + 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        totals = [[level, *total] for level, total in sorted(self._totals.items())]
        return {"every": self.every or 0, "totals": totals}

    def load_state_dict(self, state: Mapping[str, Any], sizes: Mapping[int, int]) -> None:
        """Restore `state_dict`.

        Args:
            state: the state.
            sizes: bytes of the steps on the disk. They count if `state` has other levels.
        """
        self._totals = {}
        if state["every"] == (self.every or 0):
            self._totals = {level: (count, total) for level, count, total in state["totals"]}
        else:
            for step, size in sorted(sizes.items()):
                self.add(step, size)


def _factors_of_two(number: int) -> int:
    return (number & -number).bit_length() - 1
