"""The rule for an alarm: pure functions of two evaluations, of the base model and of the policy.

Shapes: I images. All comparisons are paired: both evaluations have the same prompts and noise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flowgrain.config.watch import WatchConfig
from flowgrain.monitors import MONITORS
from flowgrain.statistics import CONFIDENCE, Interval, confidence_interval

Column = NDArray[np.floating]


@dataclass(frozen=True)
class Measured:
    """The values of an evaluation.

    Attributes:
        prompts: texts of I prompts.
        num_steps: ODE steps of an image.
        guidance: guidance scale.
        scores: [I] by reward. NaN: the reward failed.
        monitors: [I] by monitor. NaN: not available.
    """

    prompts: list[str]
    num_steps: int
    guidance: float
    scores: Mapping[str, Column]
    monitors: Mapping[str, Column]

    @property
    def columns(self) -> dict[str, Column]:
        """[I] by reward and by monitor. No reward has the name of a monitor."""
        return {**self.scores, **self.monitors}


@dataclass(frozen=True)
class Difference:
    """A paired difference to the base model: its mean and the ends of its 95% interval.

    std is the standard deviation of the images of the base model.
    """

    mean: float
    low: float
    high: float
    std: float


@dataclass(frozen=True)
class Finding:
    """A monitor or reward that changed by more than the rule allows.

    Attributes:
        monitor: its name.
        direction: in which direction it changed.
        difference: mean paired difference to the base model.
        low: lower end of the interval, at the level of the rule.
        high: upper end.
        threshold: allowed change, in the unit of the monitor.
    """

    monitor: str
    direction: Literal["up", "down"]
    difference: float
    low: float
    high: float
    threshold: float

    @property
    def excess(self) -> float:
        """The change in multiples of the allowed change."""
        return abs(self.difference) / self.threshold if self.threshold else np.inf


def why_not_comparable(base: Measured, now: Measured) -> str | None:
    """Why two evaluations cannot be compared. None if they can."""
    for name in ("num_steps", "guidance"):
        before, after = getattr(base, name), getattr(now, name)
        if before != after:
            setting = {"guidance": "evaluation.guidance_scale"}.get(name, f"evaluation.{name}")
            return f"{setting} was {before:g} before training and is {after:g}"
    return None if _common(base, now).any() else "the evaluation prompts have changed"


def _common(base: Measured, now: Measured) -> NDArray[np.bool_]:
    """Which of the first images of both evaluations have the same prompt, and thus are pairs."""
    pairs = zip(base.prompts, now.prompts, strict=False)
    return np.array([before == after for before, after in pairs], dtype=bool)


def _pairs(base: Measured, now: Measured) -> Iterator[tuple[str, Column, Column]]:
    """Name, values of the base model and paired values of the policy, in float64."""
    common = _common(base, now)
    before, after = base.columns, now.columns
    for name in after:
        if name in before:
            first, last = (c[name][: len(common)][common].astype(float) for c in (before, after))
            yield name, first, last


def differences(base: Measured, now: Measured) -> dict[str, Difference]:
    """The paired difference of every reward and monitor that both evaluations have.

    Empty if the evaluations cannot be compared.
    """
    if why_not_comparable(base, now) is not None:
        return {}
    found = {}
    for name, before, after in _pairs(base, now):
        interval = confidence_interval(after - before)
        found[name] = Difference(interval.mean, interval.low, interval.high, _std(before))
    return found


def find(
    base: Measured, now: Measured, weights: Mapping[str, float], rule: WatchConfig
) -> list[Finding]:
    """The monitors and rewards for which `rule` holds, the largest excess first.

    The rule holds if the 95% interval of the trained reward is above 0, and the interval of the
    monitor is beyond the threshold. The level of the second interval is divided by the number of
    watched monitors and rewards (Bonferroni), so that an evaluation of an unchanged model raises a
    false alarm in at most 5% of cases even with a threshold of 0.

    Args:
        base: evaluation of the base model.
        now: evaluation of the policy.
        weights: weight of every trained reward.
        rule: what counts as an alarm.
    """
    if why_not_comparable(base, now) is not None or not trained_reward_rose(base, now, weights):
        return []
    watched = [
        (name, before, after)
        for name, before, after in _pairs(base, now)
        if name not in weights and _is_watched(name, rule) and np.isfinite(after - before).sum() > 1
    ]
    level = 1 - (1 - CONFIDENCE) / max(len(watched), 1)
    found = (
        _finding(name, before, confidence_interval(after - before, level), rule)
        for name, before, after in watched
    )
    return sorted((f for f in found if f is not None), key=lambda f: -f.excess)


def _is_watched(name: str, rule: WatchConfig) -> bool:
    """Whether the monitor or reward `name` can raise an alarm."""
    if rule.monitor == "all":
        return name not in MONITORS or MONITORS[name].watched
    return name in rule.monitor


def trained_reward_rose(base: Measured, now: Measured, weights: Mapping[str, float]) -> bool:
    """Whether the weighted sum of the trained rewards is significantly above the base model.

    True if no trained reward is evaluated: the rule then depends on the monitors only.
    """
    changes = [
        weights[name] * (after - before)
        for name, before, after in _pairs(base, now)
        if name in weights
    ]
    return not changes or confidence_interval(np.sum(changes, axis=0)).low > 0


def _finding(name: str, before: Column, interval: Interval, rule: WatchConfig) -> Finding | None:
    monitor = MONITORS.get(name)
    worse = "down" if monitor is None else monitor.worse
    direction = worse if rule.direction == "worse" else rule.direction
    if monitor is None:
        threshold = rule.reward_threshold * _std(before)
    else:
        unit = _std(before) if monitor.spread else 1.0
        threshold = rule.threshold * max(unit, monitor.least)
    way: Literal["up", "down"]
    if direction != "down" and interval.low > threshold:
        way = "up"
    elif direction != "up" and interval.high < -threshold:
        way = "down"
    else:
        return None
    return Finding(name, way, interval.mean, interval.low, interval.high, threshold)


def _std(values: Column) -> float:
    """Standard deviation of the finite values. 0 for fewer than two."""
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
