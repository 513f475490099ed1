"""Turning points against a loop over trajectories, the balance, and missing scores."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrain.core.credit import Normalization
from flowgrain.core.tree import Planner, Tree
from flowgrain.core.turning_points import (
    balanced,
    process_rewards,
    step_rewards,
    turning_point,
    turning_points,
)


def completed(count: int, steps: list[int], num_steps: int) -> Tree:
    """`count` trajectories with stochastic steps at the grid indices `steps`, all completed."""
    planner = Planner(num_steps)
    for _ in range(count):
        node = planner.root()
        for k in range(num_steps):
            planner.image(planner.ode(node), channel=k)
            node = planner.sde(node)[0] if k in steps else planner.ode(node, to=k + 1)
        planner.image(node, channel=num_steps)
    return planner.tree()


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def by_hand(sequence: list[float], kind: str) -> list[bool]:
    """Turning points of a trajectory with the rewards R_0 to R_n. R_n is the image's."""
    gains = [b - a for a, b in itertools.pairwise(sequence)]
    trend, found = sign(sequence[-1] - sequence[0]), []
    for k, gain in enumerate(gains):
        turn = sign(gain) * sign(sequence[-1] - sequence[k + 1]) > 0
        if k and kind == "all":
            turn = turn and sign(gain) * sign(gains[k - 1]) < 0
        elif k:
            turn = turn and sign(gain) == trend and sign(gains[k - 1]) == -trend and trend != 0
        found.append(turn)
    return found


rewards_of = st.lists(st.integers(-3, 3), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    trajectories=st.lists(rewards_of, min_size=1, max_size=4),
    kind=st.sampled_from(["all", "consistent"]),
)
def test_turning_points_of_whole_trajectories(trajectories, kind):
    """Three stochastic steps, then an ODE step, so that the last completion is the image."""
    tree = completed(len(trajectories), [0, 1, 2], 4)
    rewards = torch.tensor(trajectories, dtype=torch.float32).flatten()
    assert len(tree.leaves) == len(rewards)
    steps = step_rewards(tree, rewards)
    expected = [turn for rewards in trajectories for turn in by_hand(rewards, kind)]
    assert turning_points(steps, kind).tolist() == expected
    values = process_rewards(tree, rewards, kind, balance=False).reshape(-1, 3)
    flags = torch.tensor(expected).reshape(-1, 3)
    for trajectory, of_steps, flag in zip(trajectories, values, flags, strict=True):
        for k in range(3):
            end = trajectory[-1] if flag[k] else trajectory[k + 1]
            assert of_steps[k] == end - trajectory[k]


def test_steps_with_ode_steps_between_them():
    """The completions around an ODE step have the same image, so the previous step counts."""
    tree = completed(1, [0, 2], 4)
    steps = step_rewards(tree, torch.arange(len(tree.leaves), dtype=torch.float32))
    assert steps.previous.tolist() == [-1, 0]
    assert steps.first.tolist() == [0, 0]
    assert len(tree.leaves) == 3
    assert steps.before.tolist() == [0, 1]
    assert steps.after.tolist() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), max_size=12))
def test_the_balance_keeps_the_largest_of_both_sides(pairs):
    chosen = torch.tensor([flag for flag, _ in pairs], dtype=torch.bool)
    value = torch.tensor([v for _, v in pairs], dtype=torch.float64)
    kept = balanced(chosen, value)
    sides = [[abs(v) for flag, v in pairs if flag and s * v > 0] for s in (1, -1)]
    count = min(map(len, sides))
    if not count:
        assert torch.equal(kept, chosen)
        return
    assert not (kept & ~chosen).any()
    for side, s in zip(sides, (1, -1), strict=True):
        ours = sorted(abs(float(v)) for v in value[kept & (s * value > 0)])
        assert ours == sorted(side)[len(side) - count :]


def test_a_missing_score_is_no_turning_point_and_has_no_advantage():
    tree = completed(3, [0, 1, 2], 4)
    rewards = torch.tensor([0.0, -1, 2, 3, 0, 1, math.nan, 2, 0, -2, -1, -3])
    steps = step_rewards(tree, rewards)
    chosen = turning_points(steps, "all").reshape(3, 3)
    assert not chosen[1, 1:].any()
    assert chosen[0].tolist() == [False, True, False]
    advantage = turning_point(tree, rewards, Normalization(), "all", balance=False).reshape(3, 3)
    assert advantage[1, 1:].tolist() == [0, 0]
    assert advantage.isfinite().all()
