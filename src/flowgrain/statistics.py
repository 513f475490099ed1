"""Confidence intervals of means. All intervals of the package use this method."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval, by default 95%. NaN: not known."""

    mean: float
    low: float
    high: float


def confidence_interval(values: NDArray[np.floating], confidence: float = CONFIDENCE) -> Interval:
    """The mean of the finite `values` with its confidence interval (Student's t).

    Args:
        values: independent values, such as a score of each prompt or of each seed.
        confidence: coverage of the interval, in 0..1.

    Returns:
        The interval. The ends are NaN for fewer than two finite values, the mean is NaN for none.
    """
    from scipy import stats  # takes half a second

    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    half = float(stats.sem(values) * quantile)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)
