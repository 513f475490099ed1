"""Confidence intervals. All intervals of the package use this method."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% confidence interval. NaN: not known."""

    mean: float
    low: float
    high: float


def confidence_interval(values: NDArray[np.floating]) -> Interval:
    """The mean of the finite `values` with its 95% confidence interval (Student's t).

    Args:
        values: independent values, such as a score of each prompt or of each seed.

    Returns:
        The interval. The ends are NaN for fewer than two finite values, the mean is NaN for none.
    """
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    from scipy.special import stdtrit  # scipy takes long to import

    quantile = stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)
    half = float(values.std(ddof=1) / math.sqrt(len(values)) * quantile)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)
