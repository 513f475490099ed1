"""The bundled world: split, renderings, oracle, learned rewards, weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

import flowgrain
from flowgrain.rewards import OF_SHAPES, load_reward
from flowgrain.shapes.grammar import MAX_WORDS, all_prompts, parse, prompts, tokenize
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import render


def test_the_three_sets_of_prompts_share_nothing():
    sets = {split: prompts(split) for split in ("train", "validation", "held-out")}
    assert sorted(p for chosen in sets.values() for p in chosen) == sorted(all_prompts())
    assert len(sets["validation"]) >= 256
    assert len(sets["held-out"]) >= 256
    assert all(len(tokenize(p)) == MAX_WORDS for p in all_prompts())


def test_oracle_reads_true_renderings():
    chosen = list(all_prompts())
    images = render([parse(p) for p in chosen], np.random.default_rng(0))
    assert judge(images, chosen)[0].mean() >= 0.97
    half = len(chosen) // 2  # neighbours in the grammar are alike
    assert judge(images, chosen[half:] + chosen[:half])[0].mean() < 0.3


@pytest.mark.parametrize(
    ("drawn", "asked", "score", "kind"),
    [
        ("two red circles", "two red circles", 1.0, None),
        ("two red circles", "four red circles", 0.5, "missing"),
        ("four red circles", "two red circles", 0.5, "extra"),
        ("two red squares", "two red circles", 0.4, "wrong shape"),
        ("two blue circles", "two red circles", 0.0, "wrong colour"),
        ("red circle above blue square", "red circle below blue square", 0.7, "wrong relation"),
    ],
)
def test_oracle_gives_partial_credit_and_names_the_failure(drawn, asked, score, kind):
    images = render([parse(drawn)] * 20, np.random.default_rng(0))
    scores, failures = judge(images, [asked] * 20)
    assert np.median(scores) == pytest.approx(score, abs=1e-5)
    if kind is not None:
        assert failures[kind].mean() >= 0.9
    assert sum(shown.mean() > 0.5 for shown in failures.values()) == (kind is not None)


def test_an_empty_image_scores_nothing():
    assert judge(np.zeros((1, 3, 32, 32), dtype=np.float32), ["red circle above blue square"])[0][0] == 0


@pytest.mark.parametrize("name", OF_SHAPES)
def test_rewards_prefer_the_right_image(name):
    chosen = list(prompts("held-out"))[:64]
    images = torch.from_numpy(render([parse(p) for p in chosen], np.random.default_rng(2)))
    reward = load_reward(name)
    right, wrong = (torch.as_tensor(reward(shown, chosen)) for shown in (images, images.roll(1, 0)))
    assert (right > wrong).float().mean() > 0.9


def test_weights_fit_the_package():
    folder = Path(flowgrain.__file__).parent / "shapes" / "weights"
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 12e6
