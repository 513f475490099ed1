"""Candidates of a tree, the choice among them, and trees that are sampled in parts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flowgrain.core.explore import (
    candidates_of,
    choice_groups,
    choose,
    coarse_steps,
    draw_table,
    extremes,
    one_score,
    replace_draws,
)
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import FlowSDE, sigma_grid
from flowgrain.core.subtree import SampledPart, assemble, subtree
from flowgrain.core.tree import ROOT, Planner
from flowgrain.data import keyed_noise
from flowgrain.methods import METHODS, plan_tree
from flowgrain.training.explore import ranking

WINDOW = {"window_size": 2}
GROUPS_OF = [
    ("flow_grpo", {"group_size": 5}, [5]),
    ("grpo_guard", {"group_size": 5}, [5]),
    ("diffusionnft", {"group_size": 4}, [4]),
    ("awm", {"group_size": 4}, [4]),
    ("densegrpo", {"group_size": 3}, [3]),
    ("dancegrpo", {"group_size": 4}, [4]),
    ("mixgrpo", {"group_size": 4, **WINDOW}, [4]),
    ("g2rpo", {"group_size": 4}, [4, 4, 4, 4]),
    ("e_grpo", {"group_size": 3}, [3, 3, 3, 3]),
    ("tempflow_grpo", {"group_size": 3, "seeds": 2, "sde_steps": (0, 3)}, [3, 3, 3, 3]),
]
"""Methods whose samples can be chosen, and the sizes of their groups on a grid of 8 steps."""
SCORES = st.lists(st.integers(0, 5).map(float) | st.just(math.nan), min_size=1, max_size=20)


@given(score=SCORES, keep=st.integers(1, 20))
def test_the_best_and_the_worst(score, keep):
    chosen = extremes(score, keep)
    values = np.array(score)
    known = ~np.isnan(values)
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    assert len(chosen) == min(keep, len(score))
    if known.sum() <= keep:
        assert known[chosen].sum() == known.sum()
        return
    assert known[chosen].all()
    # A rank without ties: of equal scores, the earlier is the worse.
    rank = np.lexsort((np.arange(len(score)), values))[: known.sum()].argsort()
    rank = dict(zip(np.sort(np.flatnonzero(known)).tolist(), rank, strict=True))
    found = sorted(int(rank[place]) for place in chosen.tolist())
    worst = keep // 2
    count = int(known.sum())
    assert found == [*range(worst), *range(count - keep + worst, count)]


@given(start=st.integers(0, 19), num_steps=st.integers(2, 20), share=st.integers(1, 20))
def test_coarse_steps_rise_to_the_end(start, num_steps, share):
    assume(start < num_steps and share <= num_steps)
    indices = [start, *coarse_steps(start, num_steps, share)]
    assert (np.diff(indices) > 0).all()
    assert indices[-1] == num_steps
    if start == 0:
        assert len(indices) == share + 1
    assert coarse_steps(start, num_steps, num_steps) == list(range(start + 1, num_steps + 1))


def plan(method, options):
    return plan_tree(METHODS.get(method)(**options), 8)


@pytest.mark.parametrize(("method", "options", "groups"), GROUPS_OF)
def test_candidates_of_a_method(method, options, groups):
    tree = plan(method, options)
    found = candidates_of(tree, 9, 3)
    assert [len(group) for group in found.groups] == groups
    assert len(found.tree.leaves) == 9 * len(groups)
    assert not len(found.tree.edges)
    # A candidate has its own draw, which no row of the plan has, except for the first ones.
    drawn = found.tree.draw[found.tree.draw >= 0]
    assert len(np.unique(drawn)) == len(drawn)
    for number, group in enumerate(found.groups):
        assert found.draw[number, : len(group)].tolist() == tree.draw[group].tolist()
    more = np.concatenate([found.draw[k, len(g) :] for k, g in enumerate(found.groups)])
    assert more.min() > tree.draw.max()
    # The last row with noise above a leaf is its candidate, group by group.
    above = []
    for leaf in found.tree.leaves:
        row = leaf
        while found.tree.draw[row] < 0:
            row = found.tree.parent[row]
        above.append(found.tree.draw[row])
    assert above == found.draw.ravel().tolist()


def test_candidates_start_from_the_states_of_the_plan():
    """Without a choice, and with all steps, the candidates of G2RPO are its images."""
    tree = plan("g2rpo", {"granularities": (1,), "group_size": 4, "anchor_image": False})
    found = candidates_of(tree, 4, 8)
    sigmas, noise = sigma_grid(8), keyed_noise((2, 3), "test")

    def velocity(x, sigma, prompt):
        return torch.tanh(x) * sigma[:, None, None]

    exact, cheap = (rollout(t, velocity, FlowSDE(0.7), sigmas, noise) for t in (tree, found.tree))
    assert torch.equal(exact.at(tree.leaves), cheap.at(found.tree.leaves))


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("branchgrpo", {}, "a branch of the tree has branches itself"),
        ("draft", {}, "a single trajectory per prompt"),
    ],
)
def test_trees_without_a_choice(method, options, reason):
    with pytest.raises(ValueError, match=reason):
        choice_groups(plan(method, options))


def test_too_few_candidates():
    with pytest.raises(ValueError, match="12 members"):
        candidates_of(plan("g2rpo", {}), 11, 3)


def test_the_chosen_draws_replace_those_of_the_plan():
    tree = plan("g2rpo", {"group_size": 3, "sde_steps": (0, 2)})
    found = candidates_of(tree, 5, 3)
    score = torch.tensor(
        [[[0.0, 4, 3, 1, 2], [1, 1, 1, 1, 1]], [[9.0, 0, 0, 0, 8], [0, 1, 2, 3, 4]]]
    )
    chosen = choose(found, score)
    assert [[c.tolist() for c in of_prompt] for of_prompt in chosen] == [
        [[0, 1, 2], [0, 3, 4]],
        [[0, 1, 4], [0, 3, 4]],
    ]
    table = draw_table(tree, found, chosen)
    asked = []

    def noise(prompt, draw):
        asked.append((prompt.tolist(), draw.tolist()))

    chosen_noise = replace_draws(noise, table)
    first, second = found.groups
    chosen_noise(np.array([1, 1, 1]), tree.draw[first])
    chosen_noise(np.array([0, 2, 3]), tree.draw[second])  # 2 and 3 repeat prompts 0 and 1
    other = np.array([tree.draw[0]])
    chosen_noise(np.array([1]), other)
    assert asked == [
        ([1, 1, 1], found.draw[0, [0, 1, 4]].tolist()),
        ([0, 2, 3], found.draw[1, [0, 3, 4]].tolist()),
        ([1], other.tolist()),
    ]


def test_one_score_of_several_rewards():
    rewards = {
        "a": torch.tensor([0.0, 1.0, 0.0, 100.0]),
        "b": torch.tensor([3.0, 1.0, torch.nan, 5.0]),
    }
    weights, groups = {"a": 1.0, "b": 0.5}, np.array([0, 0, 1, 1])
    total = one_score(rewards, weights, groups, "reward")
    assert total[:2].tolist() == [1.5, 1.5]
    assert total[2].isnan()
    normalized = one_score(rewards, weights, groups, "advantage")
    half = math.sqrt(0.5)
    expected = [-half + half / 2, half - half / 2, -half, half]
    assert normalized.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_ranking_of_the_kept_candidates():
    perfect = ranking([[1, 2, 3, 4]], [[10, 20, 30, 40]])
    assert (perfect.spearman, perfect.best_above_median) == (pytest.approx(1), 1)
    inverse = ranking([[1, 2, 3, 4]], [[40, 30, 20, 10]])
    assert (inverse.spearman, inverse.best_above_median) == (pytest.approx(-1), 0)
    both = ranking([[1, 2, 3, 4], [1, 2, math.nan, 4]], [[10, 20, 30, 40], [3, 2, 9, 1]])
    assert (both.spearman, both.best_above_median) == (pytest.approx(0), 0.5)
    unknown = ranking([[1, 1], [1, math.nan]], [[1, 2], [1, 2]])
    assert math.isnan(unknown.spearman)


@given(num_steps=st.integers(2, 6), count=st.integers(1, 3), data=st.data())
def test_a_tree_that_is_sampled_in_parts(num_steps, count, data):
    """Every prompt takes each part from any place in one of several rollouts."""
    planner = Planner(num_steps)
    for _ in range(data.draw(st.integers(2, 4))):
        branches = planner.sde(planner.root(), 2) if num_steps > 2 else [planner.root()]
        for branch in branches:
            node = planner.ode(branch, order=data.draw(st.integers(1, 2)))
            planner.image(node)
        if data.draw(st.booleans()):
            planner.keep(branches[0])
    tree, roots = planner.tree(), int((planner.tree().parent == ROOT).sum())
    cut = data.draw(st.integers(1, roots - 1))
    first, rest = subtree(tree, 0, cut), subtree(tree, cut, roots)
    assert np.array_equal(np.sort(np.concatenate([first.rows, rest.rows])), np.arange(len(tree)))
    noise, sigmas = keyed_noise((2,), "test"), sigma_grid(tree.num_steps)

    def run(part, places):
        def velocity(x, sigma, prompt):
            return torch.sin(x) + sigma[:, None]

        where = np.array(places)
        return rollout(
            part.repeat(len(places)),
            velocity,
            FlowSDE(0.7),
            sigmas,
            lambda prompt, draw: noise(where[prompt], draw),
        )

    whole, prompts = run(tree, list(range(count))), list(range(count))
    second = data.draw(st.lists(st.sampled_from(prompts), unique=True))
    parts = [(first, prompts)] + ([(first, second)] if second else [])
    sampled = []
    for number, (part, places) in enumerate(parts):
        used = [p in second if number else p not in second for p in prompts]
        source = [places.index(p) if take else -1 for p, take in zip(prompts, used, strict=True)]
        sampled.append(SampledPart(part, run(part.tree, places), np.array(source)))
    sampled.append(SampledPart(rest, run(rest.tree, prompts), np.arange(count)))
    joined = assemble(tree, sampled)
    kept = tree.repeat(count)
    rows = np.unique(
        np.concatenate([kept.leaves, kept.edges, kept.trained_parents, np.flatnonzero(kept.kept)])
    )
    assert joined.tree == kept
    torch.testing.assert_close(joined.at(rows), whole.at(rows), atol=1e-6, rtol=0)
    wasted = len(second) * len(first.tree.evaluated)
    assert joined.forward_passes == whole.forward_passes + wasted
