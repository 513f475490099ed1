"""Distances of features, and the KL along the sampling path."""

import math

import numpy as np
import pytest
import torch

from flowgrain.core.sde import sigma_grid
from flowgrain.monitors.features import base_distance, distance
from flowgrain.monitors.path import ETA, STATES, chosen_steps, path_kl


def test_distances_of_features():
    a, b = np.array([[0, 0], [3, 4]], np.float32), np.array([[3, 4], [3, 4]], np.float32)
    assert distance(a, b).tolist() == [5, 0]
    assert base_distance(a, b) == 2.5
    assert base_distance(np.array([[np.nan, 0], [3, 4]]), np.zeros((2, 2))) == 5
    assert math.isnan(base_distance(a, a))  # images that do not differ give no unit


@pytest.mark.parametrize(
    ("num_steps", "steps"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (16, [0, 5, 10, 15])]
)
def test_chosen_steps(num_steps, steps):
    assert chosen_steps(num_steps) == steps
    assert len(steps) <= STATES


def test_path_kl_is_the_kl_of_flow_sde_transitions():
    """By hand: |mean - mean'|^2 / (2 std^2) per dimension, and the mean over the states."""
    sigmas, steps = sigma_grid(4), chosen_steps(4)
    generator = torch.Generator().manual_seed(0)
    x, v, base = torch.randn(3, 2, len(steps), 2, 3, generator=generator)
    expected = torch.zeros(2)
    for number, index in enumerate(steps):
        now, after = float(sigmas[index]), float(sigmas[index + 1])
        dt = after - now
        strength = ETA * math.sqrt(now / (1 - (now if now < 1 else after)))
        scale = dt + strength**2 / (2 * now) * dt * (1 - now)
        error = (scale * (v - base)[:, number]).square().mean((1, 2))
        expected += error / (2 * strength**2 * -dt) / len(steps)
    torch.testing.assert_close(path_kl(x, v, base, sigmas), expected)
    assert path_kl(x, base, base, sigmas).tolist() == [0, 0]
