"""The rewards of the shapes model prefer correct images."""

import numpy as np
import pytest
import torch
from gradients import check_gradient

from flowgrain.data import as_prompts
from flowgrain.rewards import SHAPES_REWARDS, RewardConfig, build_reward, score, score_with_parts
from flowgrain.shapes.grammar import parse, prompts
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import render


@pytest.fixture(scope="module")
def rendered():
    texts = list(prompts("held-out"))[:64]
    images = render([parse(text) for text in texts], np.random.default_rng(2))
    return torch.from_numpy(images), texts


@pytest.mark.parametrize("name", SHAPES_REWARDS)
def test_rewards_prefer_the_right_image(name, rendered):
    images, texts = rendered
    reward = build_reward(RewardConfig(name=name))
    right, wrong = (
        torch.as_tensor(reward(shown, as_prompts(texts))) for shown in (images, images.roll(1, 0))
    )
    assert (right > wrong).float().mean() > 0.9


@pytest.mark.parametrize("name", ["towers", "preference"])
def test_the_gradient_of_a_learned_reward(name, rendered):
    images, texts = rendered
    reward = build_reward(RewardConfig(name=name))
    check_gradient(reward, 0.2 + 0.6 * images[:4], as_prompts(texts[:4]), tolerance=0.1)


def test_the_oracle_explains_its_failures(rendered):
    images, texts = rendered
    images = images.roll(1, 0)
    oracle = build_reward(RewardConfig(name="oracle"))
    scores, parts, weights = score_with_parts(oracle, images, texts, batch_size=10)
    expected, failures = judge(images.numpy(), texts)
    assert torch.equal(scores.values, torch.from_numpy(expected))
    assert {name: values.bool().tolist() for name, values in parts.items()} == {
        name: shown.tolist() for name, shown in failures.items()
    }
    assert weights == {}


def test_a_prompt_outside_the_grammar_has_no_score(rendered):
    images, _ = rendered
    reward = build_reward(RewardConfig(name="preference"))
    scores = score(reward, images[:2], ["one red circle", "a photo of a cat"], batch_size=1)
    assert scores.values.isnan().tolist() == [False, True]
    assert "a photo of a cat" in scores.reason
