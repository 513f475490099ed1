"""Measured image statistics agree with known values."""

import math

import numpy as np
import pytest
import torch

from flowgrain.data import as_prompts
from flowgrain.shapes.features import diversity, features, frechet, true_features
from flowgrain.shapes.grammar import prompts
from flowgrain.studies.measure import _image_statistics
from flowgrain.training.evaluate import Evaluation


def test_frechet_distance_of_known_gaussians():
    random = np.random.default_rng(0)
    a = random.normal(size=(20_000, 3))
    b = random.normal(size=(20_000, 3)) * [2, 1, 1] + [1, 0, 0]
    # |mean difference|^2 + trace(1 + 4 - 2 sqrt(1 * 4)), on one axis
    assert frechet(a, b) == pytest.approx(1 + 1 + 4 - 2 * 2, abs=0.1)


def test_diversity_of_known_points():
    assert diversity(np.array([[0.0, 0], [3, 4], [1, 1], [1, 1]]), 2) == pytest.approx(2.5)


def test_frechet_distance_separates_renderings_from_noise():
    held_out = list(prompts("held-out"))[:128]
    truth = true_features(held_out, 0)
    assert frechet(truth, true_features(held_out, 1)) < 0.2
    assert frechet(truth, features(torch.rand(128, 3, 32, 32))) > 2


def evaluation(images):
    texts = list(prompts("held-out"))[:4]
    return Evaluation(as_prompts(texts * 2), 2, {}, {}, {}, images)


def test_the_images_of_a_prompt_are_compared_with_each_other():
    """Images come in two rounds over the prompts. Equal rounds have no diversity."""
    images = torch.rand(4, 3, 32, 32)
    assert _image_statistics(evaluation(torch.cat([images, images])), 2)["diversity"] == 0
    reversed_round = torch.cat([images, images.flip(0)])
    assert _image_statistics(evaluation(reversed_round), 2)["diversity"] > 0


def test_images_of_a_diverged_model_have_no_statistics():
    values = _image_statistics(evaluation(torch.full((8, 3, 32, 32), math.nan)), 2)
    assert set(values) == {"frechet", "diversity"}
    assert all(math.isnan(value) for value in values.values())
