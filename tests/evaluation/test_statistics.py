"""Confidence intervals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flowgrain.evaluation import confidence_interval
from flowgrain.statistics import share_interval


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_intervals_contain_the_mean_and_move_with_the_values(values):
    found = confidence_interval(np.array(values))
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    moved = confidence_interval(np.array([*values, math.nan]) + 3)
    assert (moved.low, moved.high) == pytest.approx((found.low + 3, found.high + 3), abs=1e-6)


def test_few_values():
    nothing = confidence_interval(np.array([math.nan]))
    assert all(math.isnan(value) for value in (nothing.mean, nothing.low, nothing.high))
    single = confidence_interval(np.array([2.0, math.nan, math.inf]))
    assert single.mean == 2
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    equal = confidence_interval(np.array([2.0, 2.0]))
    assert (equal.low, equal.high) == (2, 2)


def test_the_interval_of_students_t():
    values = np.random.default_rng(0).normal(size=12)
    found = confidence_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_coverage():
    """The interval contains the mean in 95% for normal values, and less often for skewed ones."""
    rng = np.random.default_rng(3)
    normal = [confidence_interval(rng.normal(1, 2, size=10)) for _ in range(2000)]
    skewed = [confidence_interval(rng.exponential(size=40)) for _ in range(2000)]
    assert np.mean([i.low <= 1 <= i.high for i in normal]) == pytest.approx(0.95, abs=0.015)
    assert np.mean([i.low <= 1 <= i.high for i in skewed]) == pytest.approx(0.93, abs=0.02)


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (3, 4), (7, 7), (40, 100)])
def test_shares_have_wilson_intervals(hits, count):
    expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    found = share_interval(hits, count)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == hits / count
    assert math.isnan(share_interval(0, 0).mean)
