"""Ratio exactly 1 before the first update, for every kernel; the update's forward gives the rollout's log-probability."""

from dataclasses import replace

import pytest
import torch

from flowgrain.methods.algorithms import build
from flowgrain.core.sde import CPS, CalibratedSDE, DanceSDE, FlowSDE
from flowgrain.config.schema import Settings
from flowgrain.training.trainer import Run
from flowgrain.core.tree import split_updates


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.7), CalibratedSDE([0.4] * 4)])
def test_ratio_is_exactly_one_before_the_first_update(tiny, kernel, tmp_path):
    run = Run(tiny, tmp_path, method=replace(build(tiny), kernel=kernel))
    sampled = run.sample_tree(1)
    parents = sampled.result.tree.trained_parents
    old = run._old_law(sampled, parents)  # a separate pass, without gradient
    found = run._edge_loss(sampled, parents, old)
    assert torch.equal(found.ratio, torch.ones_like(found.ratio))


def test_a_second_update_is_off_policy(tiny: Settings, tmp_path):
    run = Run(tiny.model_copy(update={"updates_per_rollout": 2, "learning_rate": 1e-2}), tmp_path)
    metrics = run.step(1)
    assert metrics["updates"] == 2
    assert metrics["ratio/mean"] != 1


@pytest.mark.parametrize(("updates", "number"), [(1, 1), (2, 2), ("per_step", 2)])
def test_updates_deal_out_every_parent_once(tiny, tmp_path, updates, number):
    tree = Run(tiny, tmp_path).sample_tree(1).result.tree
    shares = split_updates(tree, updates)
    assert len(shares) == number
    assert sorted(row for share in shares for row in share) == tree.trained_parents.tolist()


def test_pass_size_does_not_matter(tiny, tmp_path):
    """7 rows a pass and 64: same images and weights but for the order of fp32 sums (1e-5 after one update)."""
    results = []
    for rows in (7, 64):
        run = Run(tiny.model_copy(update={"rows_per_pass": rows, "train_rows_per_pass": 1 if rows == 7 else None}), tmp_path)
        sampled = run.sample_tree(1)
        run.update(sampled)
        results.append((sampled.images, sampled.advantage, torch.cat([p.flatten() for p in run.policy.trained.values()])))
    (images_a, advantage_a, weights_a), (images_b, advantage_b, weights_b) = results
    torch.testing.assert_close(images_a, images_b, atol=1e-4, rtol=0)
    torch.testing.assert_close(advantage_a, advantage_b, atol=1e-3, rtol=0)
    assert (weights_a - weights_b).abs().mean() < 1e-6  # Adam's first step moves by lr 1e-4 whatever the size
