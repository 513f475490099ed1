"""Monitors of images with a known value."""

import math

import pytest
import torch

from flowgrain.monitors import MONITORS
from flowgrain.monitors.pixels import measure


def flat(*color, size=(8, 8)):
    return torch.tensor(color).reshape(1, 3, 1, 1).expand(1, 3, *size).clone()


def value(name, images):
    return float(measure(images)[name][0])


def test_the_table_has_every_monitor_of_a_rollout():
    rollouts = {name for name, monitor in MONITORS.items() if monitor.rollouts}
    assert rollouts == {*measure(flat(0.5, 0.5, 0.5)), "latent_norm"}


@pytest.mark.parametrize("size", [(8, 8), (2, 2), (7, 12), (1, 1)])
def test_an_image_of_a_single_color(size):
    values = {name: float(v[0]) for name, v in measure(flat(0.3, 0.6, 0.2, size=size)).items()}
    edges = values.pop("edge_density")
    assert edges == 0 or (math.isnan(edges) and size == (1, 1))
    assert values == {"dark": 0, "saturated": 0, "color_entropy": 0, "high_frequency": 0}


def test_dark_and_saturated_pixels():
    images = flat(0.5, 0.5, 0.5)
    images[:, :, 0] = 0.0
    images[:, :, 1] = torch.tensor([0.9, 0.05, 0.1]).reshape(1, 3, 1)
    assert value("dark", images) == pytest.approx(1 / 8)
    assert value("saturated", images) == pytest.approx(1 / 8)


def test_entropy_of_equally_frequent_colors():
    levels = (torch.arange(8) + 0.5) / 8
    images = levels.reshape(1, 1, 1, 8).expand(1, 3, 8, 8)
    assert value("color_entropy", images) == pytest.approx(3)


def test_edges_are_counted_once_per_pixel():
    images = flat(0.2, 0.2, 0.2)
    images[..., 4:] = 0.8
    assert value("edge_density", images) == pytest.approx(7 / 49)
    assert value("edge_density", images.transpose(2, 3)) == pytest.approx(7 / 49)
    images[..., 4:] = 0.29  # a smaller difference than an edge
    assert value("edge_density", images) == 0


def wave(cycles, size=16):
    """A wave along the rows with `cycles` per pixel."""
    values = 0.5 + 0.4 * torch.cos(2 * math.pi * cycles * torch.arange(size))
    return values.reshape(1, 1, 1, size).expand(1, 3, size, size)


def test_energy_of_a_grid():
    assert value("high_frequency", wave(1 / 8)) == pytest.approx(0, abs=1e-6)
    assert value("high_frequency", wave(3 / 8)) == pytest.approx(1, abs=1e-6)
    assert value("high_frequency", wave(1 / 2)) == pytest.approx(1, abs=1e-6)
    mixed = (wave(1 / 8) + wave(3 / 8)) / 2
    assert value("high_frequency", mixed) == pytest.approx(0.5, abs=1e-6)
    assert value("high_frequency", mixed.transpose(2, 3)) == pytest.approx(0.5, abs=1e-6)
    with_nyquist = (wave(1 / 8) + wave(1 / 2)) / 2  # all power of this wave is in one coefficient
    assert value("high_frequency", with_nyquist) == pytest.approx(2 / 3, abs=1e-6)


def test_a_broken_image_has_no_values_and_does_not_change_others():
    images = torch.rand(3, 3, 8, 8)
    expected = measure(images)
    images[1, 0, 2, 2] = math.nan
    for name, values in measure(images).items():
        assert math.isnan(values[1]), name
        assert torch.equal(values[[0, 2]], expected[name][[0, 2]]), name


def test_parts_do_not_change_the_values(monkeypatch):
    images = torch.rand(5, 3, 8, 8)
    expected = measure(images)
    monkeypatch.setattr("flowgrain.monitors.pixels._PIXELS", 128)  # two images
    for name, values in measure(images).items():
        torch.testing.assert_close(values, expected[name])
