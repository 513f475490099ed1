"""A sliding window of stochastic steps (MixGRPO).

The window is a function of the options, the training step and the seed.
"""

import bisect
import itertools
import math
from typing import Literal

import numpy as np

from flowgrain.methods.policy_gradient import PolicyGradient
from flowgrain.settings import Setting

WindowSchedule = Literal["progressive", "random", "decay", "exp_decay", "frozen"]


class WindowChoice(PolicyGradient):
    """Options of methods that make the steps of a sliding window stochastic."""

    window_size: int = Setting(
        4, "Stochastic steps in the window (w).", unit="grid steps", ge=1, le=1000
    )
    window_stride: int = Setting(
        1, "Grid steps by which the window moves.", unit="grid steps", ge=1, le=1000
    )
    window_interval: int = Setting(
        25,
        "Training steps between two moves (tau).",
        unit="training steps",
        ge=1,
        le=10_000_000,
    )
    window_schedule: WindowSchedule = Setting(
        "progressive", "How the window moves. frozen: it stays at the start of the grid."
    )
    window_region: Literal["all", "first_half"] = Setting(
        "all", "Part of the grid that the window visits."
    )
    window_end: Literal["roll_back", "stay"] = Setting(
        "roll_back", "After the last position: return to the start, or stay."
    )

    @property
    def plan_varies(self) -> bool:
        """Whether the window moves."""
        return self.window_schedule != "frozen"

    def window(self, num_steps: int, step: int, seed: int) -> range:
        """The stochastic grid steps of training step `step` (from 1).

        The window is the same on every rank and after a resume. It never contains the step into
        sigma = 0.
        """
        last = self._room(num_steps) - self.window_size
        if self.window_schedule == "random":
            left = int(np.random.default_rng([seed, step]).integers(0, last + 1))
        else:
            lefts = list(range(0, last + 1, self.window_stride))
            if self.window_end == "stay" and lefts[-1] != last:
                lefts.append(last)
            ends = list(itertools.accumulate(self._duration(num_steps, left) for left in lefts))
            done = max(step, 1) - 1  # training steps before this step
            done = min(done, ends[-1] - 1) if self.window_end == "stay" else done % ends[-1]
            left = lefts[bisect.bisect_right(ends, done)]
        return range(left, left + self.window_size)

    def _room(self, num_steps: int) -> int:
        return num_steps // 2 if self.window_region == "first_half" else num_steps - 1

    def _duration(self, num_steps: int, left: int) -> int:
        """Training steps for which the window stays at `left` (section 3.2 and published code)."""
        tau, share = self.window_interval, left / max(num_steps - 2, 1)
        if self.window_schedule == "decay":
            return max(1, int(tau * (1 - share) + share))
        if self.window_schedule == "exp_decay":
            return max(1, math.ceil(tau * math.exp(-0.1 * max(0, left - (num_steps + 1) // 2))))
        if self.window_schedule == "frozen":
            return 2**62
        return tau

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        super().check(num_steps)
        room = self._room(num_steps)
        if self.window_size > room:
            raise ValueError(
                f"window_size={self.window_size}: sampling.num_steps={num_steps} with "
                f"method.window_region={self.window_region} has room for {room}. Use 1 to {room}."
            )
