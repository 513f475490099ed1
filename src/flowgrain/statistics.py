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
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    from scipy.special import stdtrit  # scipy takes long to import

    quantile = stdtrit(len(values) - 1, (1 + confidence) / 2)
    half = float(values.std(ddof=1) / math.sqrt(len(values)) * quantile)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)


def share_interval(hits: float, count: int) -> Interval:
    """The share `hits` / `count` with its 95% Wilson interval.

    Args:
        hits: number of hits, for example of won comparisons. A tie counts half.
        count: number of all.

    Returns:
        The interval, which is inside of 0..1. NaN for `count` 0.
    """
    from scipy.special import ndtri

    if not count:
        return Interval(math.nan, math.nan, math.nan)
    z, share = float(ndtri((1 + CONFIDENCE) / 2)), hits / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    half = z * spread / (1 + z * z / count)
    return Interval(share, max(0.0, center - half), min(1.0, center + half))
