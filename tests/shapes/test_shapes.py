"""The shapes world: prompt splits, renderings, oracle, learned rewards, bundled weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

import flowgrain
from flowgrain.data import as_prompts
from flowgrain.rewards import RewardConfig, build_reward
from flowgrain.shapes.features import diversity, features, frechet, true_features
from flowgrain.shapes.grammar import MAX_WORDS, all_prompts, parse, prompts, tokenize
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import render


def test_the_splits_are_disjoint_and_complete():
    splits = {split: prompts(split) for split in ("train", "validation", "held-out")}
    assert sorted(p for split in splits.values() for p in split) == sorted(all_prompts())
    assert len(splits["validation"]) >= 256
    assert len(splits["held-out"]) >= 256
    assert all(len(tokenize(p)) == MAX_WORDS for p in all_prompts())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("five red circles", "cannot read the prompt 'five red circles'. Use prompts such as"),
        ("one red circles", "cannot read"),
        ("", "cannot read the prompt ''"),
        (
            "red circle above blue square and more",
            "has 7 words. The maximum of the shapes model is 6",
        ),
    ],
)
def test_a_prompt_outside_the_grammar_is_an_error(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse(prompt)


def test_the_oracle_reads_correct_renderings():
    chosen = list(all_prompts())
    images = render([parse(p) for p in chosen], np.random.default_rng(0))
    assert judge(images, chosen)[0].mean() >= 0.97
    half = len(chosen) // 2  # Neighbors in the grammar are similar.
    assert judge(images, chosen[half:] + chosen[:half])[0].mean() < 0.3


@pytest.mark.parametrize(
    ("rendered", "prompt", "score", "kind"),
    [
        ("two red circles", "two red circles", 1.0, None),
        ("two red circles", "four red circles", 0.5, "missing"),
        ("four red circles", "two red circles", 0.5, "extra"),
        ("two red squares", "two red circles", 0.4, "wrong shape"),
        ("two blue circles", "two red circles", 0.0, "wrong color"),
        ("red circle above blue square", "red circle below blue square", 0.7, "wrong relation"),
    ],
)
def test_the_oracle_gives_partial_scores_and_names_the_failure(rendered, prompt, score, kind):
    images = render([parse(rendered)] * 20, np.random.default_rng(0))
    scores, failures = judge(images, [prompt] * 20)
    assert np.median(scores) == pytest.approx(score, abs=1e-5)
    if kind is not None:
        assert failures[kind].mean() >= 0.9
    assert sum(shown.mean() > 0.5 for shown in failures.values()) == (kind is not None)


def test_an_empty_image_scores_zero():
    image = np.zeros((1, 3, 32, 32), dtype=np.float32)
    assert judge(image, ["red circle above blue square"])[0][0] == 0


@pytest.mark.parametrize("name", ["oracle", "towers", "preference"])
def test_rewards_prefer_the_right_image(name):
    chosen = list(prompts("held-out"))[:64]
    images = torch.from_numpy(render([parse(p) for p in chosen], np.random.default_rng(2)))
    reward = build_reward(RewardConfig(name=name))
    right, wrong = (
        torch.as_tensor(reward(batch, as_prompts(chosen))) for batch in (images, images.roll(1, 0))
    )
    assert (right > wrong).float().mean() > 0.9


def test_features_tell_renderings_from_noise():
    chosen = list(prompts("held-out"))
    first, second = true_features(chosen, 0), true_features(chosen, 1)
    noise = features(torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert first.shape == (len(chosen), 64)
    assert 0 <= frechet(first, second) < 0.1
    assert frechet(first, noise) > 1
    assert diversity(np.repeat(first, 2, 0), 2) == 0
    assert diversity(first[: 2 * (len(first) // 2)], 2) > 0


def test_the_weights_are_small():
    folder = Path(flowgrain.__file__).parent / "shapes" / "weights"
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 12e6
