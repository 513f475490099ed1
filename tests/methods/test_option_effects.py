"""Options with a simple effect: what each one changes."""

import numpy as np
import pytest
import torch
from toy_trainer import toy_config, toy_trainer

from flowgrain import METHODS
from flowgrain.core.tree import coarse_indices
from flowgrain.core.turning_points import turning_point
from flowgrain.methods import plan_tree


def levels_of_completion(tree):
    """Grid indices that the completion of the first branch of the first step visits."""
    branch = int(np.flatnonzero(tree.stochastic)[0])
    visited, row = [], int(tree.image[tree.channel == 0][0])
    while row != branch:
        visited.append(int(tree.grid_index[row]))
        row = int(tree.parent[row])
    return [int(tree.grid_index[branch]), *reversed(visited)]


@pytest.mark.parametrize("grid", ["stride", "exact"])
def test_the_coarse_grid_of_a_granularity(grid):
    changes = {"method.coarse_grid": grid, "method.granularities": [3], "sampling.num_steps": 9}
    tree = toy_config("g2rpo", changes).tree()
    assert levels_of_completion(tree) == coarse_indices(1, 9, 3, grid)
    assert levels_of_completion(tree) == ([1, 2, 5, 9] if grid == "stride" else [1, 2, 5, 8, 9])


@pytest.mark.parametrize(("fan", "splits"), [(2, [0]), (3, [0, 1]), (4, [1, 2])])
def test_the_branches_of_a_split(fan, splits):
    leaves = fan ** len(splits)
    changes = {
        "method.split_fan": fan,
        "method.split_steps": splits,
        "method.group_size": leaves,
    }
    tree = toy_config("branchgrpo", changes).tree()
    assert len(tree.leaves) == leaves
    children = np.bincount(tree.parent[tree.stochastic])
    assert set(children[children > 0].tolist()) == {1, fan}


@pytest.mark.parametrize("clip", [0.1, 0.7])
def test_advantages_are_clamped(tmp_path, clip):
    free = toy_trainer(toy_config("g2rpo"), tmp_path).collector.collect(1).advantage
    config = toy_config("g2rpo", {"method.advantage_clip": clip})
    clamped = toy_trainer(config, tmp_path).collector.collect(1).advantage
    assert free.abs().max() > clip
    assert torch.equal(clamped, free.clamp(-clip, clip))


def test_edges_of_a_prompt_are_compared_by_step_or_together(tmp_path):
    def means(comparison):
        config = toy_config(
            "g2rpo", {"method.comparison": comparison, "method.std_scope": "global"}
        )
        batch = toy_trainer(config, tmp_path).collector.collect(1)
        tree, edges = batch.tree, batch.tree.edges
        by_prompt = [batch.advantage[tree.prompt[edges] == p].mean() for p in (0, 1)]
        step = tree.grid_index[edges]
        by_step = [
            batch.advantage[(tree.prompt[edges] == p) & (step == k)].mean()
            for p in (0, 1)
            for k in np.unique(step)
        ]
        return torch.stack(by_prompt).abs().max(), torch.stack(by_step).abs().max()

    of_prompt, of_step = means("step")
    assert of_prompt < 1e-5
    assert of_step < 1e-5
    of_prompt, of_step = means("prompt")
    assert of_prompt < 1e-5
    assert of_step > 1e-2


@pytest.mark.parametrize(
    ("step", "balance", "direction"), [(0.05, 1.0, 1), (0.02, 1.0, 1), (0.05, 1e-9, -1)]
)
def test_calibration_moves_by_its_step_where_gains_and_losses_balance(
    tmp_path, step, balance, direction
):
    """One round. An odd number of trajectories cannot balance exactly."""
    changes = {
        "method.sde_type": "calibrated_sde",
        "method.calibration.rounds": 1,
        "method.calibration.samples": 3,
        "method.calibration.step": step,
        "method.calibration.balance": balance,
    }
    trainer = toy_trainer(toy_config("densegrpo", changes), tmp_path)
    start = np.array(trainer.method.initial_psi(trainer.sigmas))
    result = trainer.calibrate()
    (round_,) = result.rounds
    difference = np.abs(np.array(round_.gained) - np.array(round_.lost))
    expected = np.where(difference < balance, step, -step)
    np.testing.assert_allclose(result.psi, np.maximum(start + expected, step), rtol=1e-6)
    assert (np.sign(expected) == direction).any()


def test_the_old_policy_keeps_a_growing_share_of_itself():
    method = METHODS.get("diffusionnft")(decay_rate=0.01, max_decay=0.25)
    assert [method.decay(step) for step in (1, 10, 25, 1000)] == [0.01, 0.1, 0.25, 0.25]
    assert METHODS.get("diffusionnft")(decay_rate=0.0).decay(1000) == 0


def test_the_share_of_noise_levels_of_an_image():
    method = METHODS.get("diffusionnft")
    counts = [method(timestep_fraction=share).num_levels(10) for share in (0.01, 0.5, 0.99, 1.0)]
    assert counts == [1, 5, 9, 10]


@pytest.mark.parametrize("balanced", [False, True])
def test_balanced_turning_points(balanced):
    """With as many turning points on both sides, some steps have their gain as reward."""
    config = toy_config("tp_grpo", {"method.group_size": 4, "method.balanced": balanced})
    tree, how = config.tree().repeat(3), config.method.normalization()
    rewards = torch.rand(len(tree.leaves), generator=torch.manual_seed(0), dtype=torch.float64)
    found = config.method.credit(tree, rewards, how)
    assert torch.equal(found, turning_point(tree, rewards, how, "consistent", balanced))
    assert not torch.equal(found, turning_point(tree, rewards, how, "consistent", not balanced))


def test_the_share_of_trained_steps():
    for share, trained in ((0.25, 1), (0.5, 2), (1.0, 4)):
        method = METHODS.get("dancegrpo")(timestep_fraction=share, group_size=2)
        tree = plan_tree(method, 5, step=3)
        assert tree.stochastic.sum() == 2 * 4
        assert tree.trained.sum() == 2 * trained
        assert method.plan_varies == (share < 1)
