"""The reward `pairwise`: exact win rates, failed comparisons, bounded calls, and both orders."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrain.data import Prompt
from flowgrain.rewards import (
    GroupReward,
    RewardConfig,
    Unscored,
    build_reward,
    register_pair_judge,
    score,
)
from flowgrain.rewards.pairwise import Pairwise, drawn_pairs, win_rates
from flowgrain.settings import SettingsError

CAT = Prompt("a cat")


def group(values):
    """Images whose brightness is `values`."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None].repeat(1, 3, 2, 2)


def brightness(images):
    return images.mean((1, 2, 3)).double()


def brighter(images, pairs, prompt):
    """A transitive judge."""
    light = brightness(images)
    return (1 + (light[pairs[:, 0]] - light[pairs[:, 1]]).sign()) / 2


def pairwise(judge, **options):
    """The reward with a judge from Python."""
    reward = Pairwise("score", **options)
    reward.judge = judge
    return reward


counts = st.integers(2, 17)
levels = st.lists(st.integers(0, 8), min_size=2, max_size=12).map(lambda v: [i / 8 for i in v])


@settings(max_examples=60, deadline=None)
@given(values=levels)
def test_all_pairs_count_the_images_that_are_worse(values):
    """The rate is the share of worse images, ties as 1/2. It has the order of the scores."""
    rates = pairwise(brighter).score_group(group(values), CAT).tolist()
    others = len(values) - 1
    wins = [sum((v > w) + 0.5 * (v == w) for w in values) - 0.5 for v in values]
    assert rates == [win / others for win in wins]
    assert sum(rates) == pytest.approx(len(values) / 2, abs=1e-12)
    for v, of_v in zip(values, rates, strict=True):
        assert all((v > w) == (of_v > of_w) for w, of_w in zip(values, rates, strict=True))


@settings(max_examples=60, deadline=None)
@given(values=levels, seed=st.integers(0, 99))
def test_a_permutation_of_the_images_permutes_the_rates(values, seed):
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    reward = pairwise(brighter, seed=seed)
    images = group(values)
    expected = reward.score_group(images, CAT)[order]
    assert torch.equal(reward.score_group(images[order], CAT), expected)


@settings(max_examples=100, deadline=None)
@given(count=counts, opponents=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_image_has_the_given_number_of_opponents(count, opponents, seed):
    pairs = drawn_pairs(count, opponents, np.random.default_rng(seed))
    unordered = {frozenset(pair) for pair in pairs.tolist()}
    assert len(unordered) == len(pairs)
    assert all(len(pair) == 2 for pair in unordered)
    used = min(opponents, count - 1)
    used += used * count % 2
    assert np.bincount(pairs.flatten(), minlength=count).tolist() == [used] * count
    first = np.bincount(pairs[:, 0], minlength=count)
    assert first.max() - first.min() <= 1
    if used >= 2:  # every image can be reached from the first by comparisons
        reached = {0}
        for _ in range(count):
            reached |= {i for pair in unordered if pair & reached for i in pair}
        assert len(reached) == count


def test_opponents_depend_on_the_seed_and_the_prompt_only():
    seen = []

    def recording(images, pairs, prompt):
        seen.append(pairs.tolist())
        return brighter(images, pairs, prompt)

    images = group(np.linspace(0, 1, 12))
    for seed, text in ((0, "a cat"), (0, "a cat"), (1, "a cat"), (0, "a dog")):
        reward = pairwise(recording, comparisons=3, seed=seed)
        reward.score_group(images.flip(0), Prompt(text))
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert seen[0] != seen[3]


def test_few_opponents_give_wins_divided_by_comparisons():
    images = group(np.linspace(0, 1, 8))
    rates = pairwise(brighter, comparisons=2).score_group(images, CAT)
    assert rates[0] == 0
    assert rates[-1] == 1
    assert set(rates.tolist()) <= {0.0, 0.5, 1.0}
    assert rates.sum() == 4


def test_a_failed_pair_is_not_a_loss(caplog):
    """Image 0 is compared with image 3 only. Image 4 is never compared."""

    def partial(images, pairs, prompt):
        preferences = brighter(images, pairs, prompt)
        for k, pair in enumerate(pairs.tolist()):
            if 4 in pair or (0 in pair and 3 not in pair):
                preferences[k] = math.nan
        return preferences

    images = group([0.9, 0.2, 0.6, 0.5, 1.0])
    with caplog.at_level(logging.WARNING):
        scores = score(pairwise(partial), images, [CAT] * 5)
    assert scores.values[:4].tolist() == pytest.approx([1, 0, 1, 1 / 3])
    assert scores.values[4].isnan()
    assert scores.failed == 1
    assert "NaN or a preference outside of 0..1" in scores.reason
    assert "6 of 10 comparisons of a prompt failed and are not counted" in caplog.text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda i, pairs, p: [2.0] * len(pairs), "outside of 0..1"),
        (lambda i, pairs, p: [0.5], r"returned shape \[1\] for 3 pairs, not \[3\]"),
        (lambda i, pairs, p: "A", "TypeError|ValueError"),
        (lambda i, pairs, p: p.nothing, "AttributeError"),
    ],
)
def test_a_wrong_judge_gives_no_scores(answer, reason):
    scores = score(pairwise(answer), group([0.1, 0.2, 0.3]), [CAT] * 3)
    assert scores.values.isnan().all()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(scores.reason)


def test_calls_are_bounded_and_end_after_the_judge_gives_up():
    sizes = []

    def gives_up(images, pairs, prompt):
        sizes.append(len(pairs))
        preferences = brighter(images, pairs, prompt)
        if len(sizes) == 2:
            raise Unscored("server gone", preferences, gave_up=True)
        return preferences

    images = group(np.linspace(0, 1, 8))
    assert not pairwise(brighter, pairs_per_call=5).score_group(images, CAT).isnan().any()
    scores = score(
        pairwise(gives_up, pairs_per_call=10), images.repeat(2, 1, 1, 1), ["a"] * 8 + ["b"] * 8
    )
    assert sizes == [10, 10]  # of 28, and none for the second prompt
    assert scores.gave_up
    assert scores.reason == "server gone"
    assert not scores.values[:8].isnan().any()
    assert scores.values[8:].isnan().all()


def test_an_error_in_a_call_masks_only_its_pairs():
    calls = []

    def second_fails(images, pairs, prompt):
        calls.append(pairs)
        if len(calls) == 2:
            raise ConnectionError("gone")
        return brighter(images, pairs, prompt)

    with pytest.raises(Unscored, match="ConnectionError: gone") as error:
        pairwise(second_fails, pairs_per_call=2).score_group(group([0.1, 0.2, 0.3, 0.4]), CAT)
    valid = np.concatenate([calls[0], calls[2]])
    expected = win_rates(4, valid, brighter(group([0.1, 0.2, 0.3, 0.4]), valid, CAT) - 0.5)
    torch.testing.assert_close(error.value.result, expected, equal_nan=True)


@pytest.mark.parametrize("bias", [0.3, 5.0])
def test_both_orders_cancel_the_bias_for_a_position(bias):
    """A judge with a bias decides some pairs by the position, but not with both orders."""

    def biased(images, pairs, prompt):
        light = brightness(images)
        return torch.sigmoid(light[pairs[:, 0]] - light[pairs[:, 1]] + bias)

    images = group([0.1, 0.9, 0.2, 0.7, 0.7])
    unbiased = pairwise(brighter).score_group(images, CAT)
    assert not torch.equal(pairwise(biased).score_group(images, CAT), unbiased)
    assert torch.equal(pairwise(biased, both_orders=True).score_group(images, CAT), unbiased)


def test_a_judge_that_always_takes_the_first_image_gives_ties():
    def first(images, pairs, prompt):
        return np.ones(len(pairs))

    rates = pairwise(first, both_orders=True).score_group(group([0.1, 0.9, 0.2]), CAT)
    assert rates.tolist() == [0.5, 0.5, 0.5]


def test_an_order_without_an_answer_masks_the_pair():
    def only_upwards(images, pairs, prompt):
        up = torch.from_numpy(pairs[:, 0] < pairs[:, 1])
        return torch.where(up, brighter(images, pairs, prompt), torch.nan)

    scores = score(pairwise(only_upwards, both_orders=True), group([0.1, 0.9]), [CAT] * 2)
    assert scores.values.isnan().all()


def test_broken_images_are_not_compared():
    images = group([0.1, 0.5, 0.9])
    images[1, 0, 0, 0] = torch.nan
    scores = score(pairwise(brighter), images, [CAT] * 3)
    assert scores.values.tolist()[::2] == [0, 1]
    assert scores.values[1].isnan()


def test_a_single_image_has_no_score():
    scores = score(pairwise(brighter), group([0.1]), [CAT])
    assert scores.failed == 1
    assert "only one image" in scores.reason


def test_judges_are_registered_with_options():
    @register_pair_judge("at_least")
    def at_least(images, pairs, prompt, *, margin: float = 0.0):
        light = brightness(images)
        return (light[pairs[:, 0]] >= light[pairs[:, 1]] + margin).double()

    config = RewardConfig(name="pairwise", judge={"name": "at_least", "margin": -2.0})
    reward = build_reward(config)
    assert isinstance(reward, GroupReward)
    (pair,) = drawn_pairs(2, 1, np.random.default_rng(0)).tolist()
    assert sorted(reward.score_group(group([0.1, 0.9]), CAT).tolist()) == [0, 1]
    assert len(pair) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"rewards\[pairwise\]\.judge: this option is required\. Options: judge, comparisons"),
        ({"judge": "scor"}, r"\]\.judge: there is no pairwise judge 'scor'\. Did you mean 'score'"),
        ({"judge": {"reward": "x"}}, r"\.judge=\{'reward': 'x'\}: has no name"),
        ({"judge": {"name": "chat"}}, r"\]\.judge\.url: this option is required\. Options: url"),
        (
            {"judge": {"name": "chat", "url": "h", "model": "m"}},
            r"rewards\[pairwise\]\.judge\.url=h: not an HTTP address",
        ),
        ({"judge": {"name": "score", "x": 1}}, r"\.judge\.x=1: unknown option\. .*Options: reward"),
        (
            {"judge": {"name": "score", "reward": "pairwise"}},
            r"\.judge\.reward=pairwise: compares images itself",
        ),
        (
            {"judge": {"name": "score", "reward": {"name": "pairwise", "judge": "score"}}},
            r"\]\.judge\.reward=pairwise: compares images itself",
        ),
        (
            {"judge": {"name": "score", "reward": {"name": "oracle", "weight": 2}}},
            r"\]\.judge\.reward\.weight: has no effect",
        ),
        (
            {"judge": {"name": "score", "reward": {"name": "oracle", "batch_size": 0}}},
            r"\]\.judge\.reward=.*greater than or equal to 1",
        ),
        ({"judge": "torch:pi"}, r"\]\.judge: an object of type float is not callable"),
        ({"judge": "flowgrain.data:Prompt"}, r"\]\.judge\.text: this option is required"),
        ({"judge": "score", "comparisons": 0}, r"\.comparisons=0: "),
        ({"judge": "score", "comparisons": "some"}, r"\.comparisons='some': "),
        ({"judge": "score", "batch_size": 8}, r"\.batch_size=8: has no effect, because this"),
    ],
)
def test_option_errors_name_the_option(options, message):
    with pytest.raises(SettingsError, match=message) as error:
        build_reward(RewardConfig(name="pairwise", **options))
    assert "\n" not in str(error.value)
