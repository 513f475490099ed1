"""Credit against brute force, and what becomes of failures and of groups without spread."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollout import trees

from flowgrain.core.credit import Normalisation, edge_values, granular, mix, normalise, outcome
from flowgrain.core.tree import Planner

HOW = Normalisation()


def below(tree, row):
    children = [i for i in range(len(tree)) if tree.parent[i] == row]
    return [row] + [deeper for child in children for deeper in below(tree, child)]


@settings(max_examples=40, deadline=None)
@given(tree=trees(), seed=st.integers(0, 99))
def test_values_are_means_of_the_leaves_below(tree, seed):
    rewards = torch.rand(len(tree.leaves), generator=torch.Generator().manual_seed(seed))
    rewards[:: max(2, seed % 5)] = torch.nan
    reward_of = dict(zip(tree.leaves.tolist(), rewards.tolist(), strict=True))
    values = edge_values(tree, rewards)
    for place, edge in enumerate(tree.edges):
        under = set(below(tree, edge))
        for channel in range(tree.num_channels):
            pairs = zip(tree.image.tolist(), tree.channel.tolist(), strict=True)
            found = [reward_of[i] for i, c in pairs if c == channel and i in under and not math.isnan(reward_of[i])]
            expected = statistics.fmean(found) if found else math.nan
            assert values[place, channel].item() == pytest.approx(expected, nan_ok=True)


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=12))
def test_normalise_is_the_standard_score(values):
    advantage = normalise(torch.tensor(values), torch.zeros(len(values), dtype=torch.long), HOW)
    if max(values) - min(values) < 1e-4:
        return
    mean, std = statistics.fmean(values), statistics.stdev(values)
    expected = torch.tensor([(v - mean) / (std + 1e-8) for v in values])
    torch.testing.assert_close(advantage, expected, atol=1e-4, rtol=1e-4)


def test_no_spread_and_failures_give_nothing():
    peers = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    values = torch.tensor([0.1, 0.1, 0.1 + 1e-9, 1.0, 3.0, torch.nan, torch.nan, 5.0])
    advantage = normalise(values, peers, HOW)
    assert advantage[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(advantage[3:5], torch.tensor([-1.0, 1.0]) / math.sqrt(2))
    assert advantage[5:].tolist() == [0, 0, 0]


def fan(count: int):
    planner = Planner(3)
    for branch in planner.sde(planner.root(), count):
        planner.image(planner.ode(branch), 0)
        planner.image(planner.ode(branch, stride=2), 1)
    return planner.tree()


def test_granular_adds_the_channels_and_clips():
    tree = fan(3)
    rewards = torch.arange(float(len(tree.leaves)))
    values = edge_values(tree, rewards)
    expected = sum(normalise(values[:, c], torch.zeros(3, dtype=torch.long), HOW) for c in range(2))
    torch.testing.assert_close(granular(tree, rewards, HOW), expected)
    both = mix(granular, tree, {"a": rewards, "b": rewards}, {"a": 1.0, "b": 2.0}, HOW, clip=0.5)
    assert both.abs().max() == 0.5
    assert not torch.equal(outcome(tree, rewards, HOW), granular(tree, rewards, HOW))


def test_mixing_by_reward_masks_what_one_reward_lost():
    tree = fan(3)
    a, b = torch.rand(len(tree.leaves)), torch.rand(len(tree.leaves))
    by_reward = mix(outcome, tree, {"a": a, "b": b}, {"a": 1.0, "b": 0.5}, HOW, by="reward")
    torch.testing.assert_close(by_reward, outcome(tree, a + 0.5 * b, HOW))
    b[:] = torch.nan
    assert mix(outcome, tree, {"a": a, "b": b}, {"a": 1.0, "b": 1.0}, HOW, by="reward").abs().max() == 0
    torch.testing.assert_close(mix(outcome, tree, {"a": a, "b": b}, {"a": 1.0, "b": 1.0}, HOW), outcome(tree, a, HOW))
