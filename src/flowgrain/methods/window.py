"""MixGRPO's sliding window: which steps are stochastic at a training step, a function of the settings and that step alone."""

import math

import numpy as np

from flowgrain.config.schema import Settings


def window(s: Settings, step: int) -> range:
    """The `window_size` stochastic grid steps of training step `step` (from 1; 0 is taken as 1), never empty.

    A pure function, so it is the same in every process and after a resume. The step into sigma = 0 is never in the window.
    """
    last = (s.num_steps // 2 if s.window_region == "first_half" else s.num_steps - 1) - s.window_size
    if s.window_schedule == "random":
        left = int(np.random.default_rng([s.seed, step]).integers(0, last + 1))
    else:
        left, until = 0, _stay(s, 0)
        while max(step, 1) > until and not (left == last and s.window_end == "stay"):
            left += s.window_stride
            if left > last:
                left = last if s.window_end == "stay" else 0
            until += _stay(s, left)
    return range(left, left + s.window_size)


def _stay(s: Settings, left: int) -> int:
    """How many training steps the window stays at left edge `left`; always at least 1 (MixGRPO section 3.2 and public code)."""
    tau, share = s.window_interval, left / max(s.num_steps - 2, 1)
    if s.window_schedule == "decay":
        return max(1, int(tau * (1 - share) + share))
    if s.window_schedule == "exp_decay":
        return max(1, math.ceil(tau * math.exp(-0.1 * max(0, left - (s.num_steps + 1) // 2))))
    if s.window_schedule == "frozen":
        return 2**62
    return tau
