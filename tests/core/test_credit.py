"""Credit against brute force, failed rewards, and groups without spread."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import trees

from flowgrain.core.credit import (
    Normalization,
    combine,
    edge_values,
    granular,
    normalize,
    outcome,
    row_values,
    softmax_outcome,
    softmax_values,
    standardize,
)
from flowgrain.core.tree import Planner, Tree

HOW = Normalization()


def subtree(tree: Tree, row: int) -> list[int]:
    """`row` and all rows below it."""
    children = [i for i in range(len(tree)) if tree.parent[i] == row]
    return [row] + [deeper for child in children for deeper in subtree(tree, child)]


@settings(max_examples=40, deadline=None)
@given(tree=trees(), seed=st.integers(0, 99))
def test_values_are_means_of_the_leaves_below(tree, seed):
    rewards = torch.rand(len(tree.leaves), generator=torch.Generator().manual_seed(seed))
    rewards[:: max(2, seed % 5)] = torch.nan
    reward_of = dict(zip(tree.leaves.tolist(), rewards.tolist(), strict=True))
    images = list(zip(tree.image.tolist(), tree.channel.tolist(), strict=True))
    values = edge_values(tree, rewards)
    for place, edge in enumerate(tree.edges):
        below = set(subtree(tree, edge))
        for channel in range(tree.num_channels):
            scores = [reward_of[i] for i, c in images if c == channel and i in below]
            scores = [score for score in scores if not math.isnan(score)]
            expected = statistics.fmean(scores) if scores else math.nan
            assert values[place, channel].item() == pytest.approx(expected, nan_ok=True)


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=12))
def test_normalize_is_the_standard_score(values):
    one_group = torch.zeros(len(values), dtype=torch.long)
    advantage = normalize(torch.tensor(values), one_group, HOW)
    if max(values) - min(values) < 1e-4:
        return
    mean, std = statistics.fmean(values), statistics.stdev(values)
    expected = torch.tensor([(v - mean) / (std + 1e-8) for v in values])
    torch.testing.assert_close(advantage, expected, atol=1e-4, rtol=1e-4)


def test_failures_and_groups_without_spread_have_advantage_zero():
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    values = torch.tensor([0.1, 0.1, 0.1 + 1e-9, 1.0, 3.0, torch.nan, torch.nan, 5.0])
    advantage = normalize(values, groups, HOW)
    assert advantage[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(advantage[3:5], torch.tensor([-1.0, 1.0]) / math.sqrt(2))
    assert advantage[5:].tolist() == [0, 0, 0]


def fan(count: int) -> Tree:
    """`count` branches of one root, each completed at two granularities."""
    planner = Planner(3)
    for branch in planner.sde(planner.root(), count):
        planner.image(planner.ode(branch), 0)
        planner.image(planner.ode(branch, stride=2), 1)
    return planner.tree()


def test_granular_adds_the_channels_and_combine_clips():
    tree = fan(3)
    rewards = torch.arange(float(len(tree.leaves)))
    values, one_group = edge_values(tree, rewards), torch.zeros(3, dtype=torch.long)
    expected = sum(normalize(values[:, channel], one_group, HOW) for channel in range(2))
    torch.testing.assert_close(granular(tree, rewards, HOW), expected)
    both = {"a": rewards, "b": rewards}
    advantage = combine(granular, tree, both, {"a": 1.0, "b": 2.0}, HOW, clip=0.5)
    assert advantage.abs().max() == 0.5
    assert not torch.equal(outcome(tree, rewards, HOW), granular(tree, rewards, HOW))


def test_a_missing_score_masks_the_image_only_in_a_sum_of_rewards():
    tree = fan(3)
    a, b = torch.rand(len(tree.leaves)), torch.rand(len(tree.leaves))
    both, weights = {"a": a, "b": b}, {"a": 1.0, "b": 0.5}
    by_reward = combine(outcome, tree, both, weights, HOW, by="reward")
    torch.testing.assert_close(by_reward, outcome(tree, a + 0.5 * b, HOW))
    b[:] = torch.nan
    assert combine(outcome, tree, both, weights, HOW, by="reward").abs().max() == 0
    by_advantage = combine(outcome, tree, both, weights, HOW)
    torch.testing.assert_close(by_advantage, outcome(tree, a, HOW))


@settings(max_examples=40, deadline=None)
@given(tree=trees(), seed=st.integers(0, 99))
def test_softmax_values_against_a_recursion(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(len(tree.leaves), generator=generator)
    rewards[:: max(2, seed % 5)] = torch.nan
    log_prob = 3 * torch.randn(len(tree), generator=generator)
    values, means = softmax_values(tree, rewards, log_prob), row_values(tree, rewards)

    def recursion(row: int, channel: int) -> float:
        children = [i for i in range(len(tree)) if tree.parent[i] == row]
        if not children:
            return float(means[row, channel])
        found = [(float(log_prob[i]), recursion(i, channel)) for i in children]
        found = [(math.exp(w), v) for w, v in found if not math.isnan(v)]
        total = sum(w for w, _ in found)
        return sum(w * v for w, v in found) / total if found else math.nan

    for row in range(len(tree)):
        for channel in range(tree.num_channels):
            expected = recursion(row, channel)
            ours = float(values[row, channel])
            assert ours == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_equal_probabilities_give_the_mean_of_a_full_tree():
    planner = Planner(3)
    nodes = [planner.root()]
    for _ in range(3):
        nodes = [child for node in nodes for child in planner.sde(node, 2)]
    for node in nodes:
        planner.image(node)
    tree, rewards = planner.tree(), torch.rand(8, generator=torch.Generator().manual_seed(0))
    same = torch.full((len(tree),), -1.4)
    torch.testing.assert_close(softmax_values(tree, rewards, same), row_values(tree, rewards))
    torch.testing.assert_close(
        softmax_outcome(tree, rewards, HOW, same), outcome(tree, rewards, HOW)
    )


def test_given_statistics_of_the_prompt():
    planner = Planner(2)
    for _ in range(2):
        planner.image(planner.ode(planner.sde(planner.root())[0]))
    tree = planner.tree().repeat(2)
    rewards = torch.tensor([1.0, math.nan, 5.0, 7.0])
    baseline = torch.tensor([[3.0, 2.0], [4.0, 0.0]])
    advantage = standardize(tree, rewards, baseline, Normalization(epsilon=0.5))
    assert advantage.tolist() == pytest.approx([-2 / 2.5, 0, 0, 0])
