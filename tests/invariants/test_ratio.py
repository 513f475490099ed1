"""The ratio is exactly 1 before the first update, for every kernel; updates and batch sizes."""

import numpy as np
import pytest
import torch

from flowgrain import load_config
from flowgrain.core.cost import split_updates
from flowgrain.training import Trainer
from flowgrain.training.policy_gradient import PolicyGradientLoss
from flowgrain.training.step import update

KERNELS = [
    {"method.sde_type": "cps", "method.eta": 0.7, "method.cps_log_prob": "squared_error"},
    {"method.sde_type": "flow_sde", "method.eta": 0.7},
    {"method.sde_type": "dance_sde", "method.eta": 0.3},
    {"method.sde_type": "cps", "method.eta": 0.7},
    {"method.sde_type": "calibrated_sde", "method.psi": [0.4] * 4},
]


def rollout_losses(trainer: Trainer) -> PolicyGradientLoss:
    """The losses of the first rollout batch."""
    batch = trainer.collector.collect(1)
    return PolicyGradientLoss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel["method.sde_type"])
def test_ratio_is_exactly_one_before_the_first_update(tiny, kernel, tmp_path):
    losses = rollout_losses(Trainer(tiny.with_changes(kernel), tmp_path))
    with torch.no_grad():  # a separate forward pass without gradient
        losses._old = [
            [losses._transition(b.rows, losses.policy.train_velocity)[0] for b in u.micro_batches]
            for u in losses.updates
        ]
    ratio = losses.terms(0, 0)["ratio"]
    assert len(ratio) == len(losses.batch.tree.edges)
    assert torch.equal(ratio, torch.ones_like(ratio))


def test_old_transitions_of_later_updates_are_those_before_the_first(tiny, tmp_path):
    losses = rollout_losses(Trainer(tiny.with_changes({"method.updates_per_rollout": 2}), tmp_path))
    losses.prepare()
    for number in range(2):
        ratio = losses.terms(number, 0)["ratio"]
        assert torch.equal(ratio, torch.ones_like(ratio))


def test_a_second_update_is_off_policy(tiny, tmp_path):
    changes = {"method.updates_per_rollout": 2, "optimizer.learning_rate": 1e-2}
    metrics = Trainer(tiny.with_changes(changes), tmp_path).step(1)
    assert metrics["updates"] == 2
    assert metrics["ratio/mean"] != 1


@pytest.mark.parametrize(("updates", "number"), [(1, 1), (2, 2), ("per_step", 2)])
def test_every_trained_parent_is_in_exactly_one_update(tiny, updates, number):
    tree = tiny.tree().repeat(2)
    shares = split_updates(tree, updates)
    assert len(shares) == number
    assert sorted(row for share in shares for row in share) == tree.trained_parents.tolist()


def test_more_updates_than_prompts_mix_prompts_and_steps():
    tree = load_config("branchgrpo").tree().repeat(4)
    shares = split_updates(tree, 37)
    assert {len(share) for share in shares} <= set(range(20, 25))  # 4 x 187 parents
    together = np.concatenate(shares)
    assert sorted(together.tolist()) == tree.trained_parents.tolist()
    for share in shares:
        assert set(tree.prompt[share]) == set(range(4))
        assert len(set(tree.grid_index[share])) >= 5
    few = split_updates(load_config("g2rpo", {"method.sde_steps": [0, 1]}).tree(), 5)
    assert [len(share) for share in few] == [1, 1]


@pytest.mark.parametrize(
    ("name", "updates", "edges"),
    [
        ("flow_grpo", 2, [108, 108]),  # 12 of 24 trajectories with 9 steps
        ("dancegrpo", 3, None),
        ("mixgrpo", 4, [21, 9, 9, 9]),  # the first window step of all 12 samples has one parent
        ("tempflow_grpo", 2, [108, 108]),  # 2 of 4 trunks with 9 steps and 6 branches
        ("densegrpo", 2, [120, 120]),
    ],
)
def test_every_update_has_samples_of_every_prompt(name, updates, edges):
    """All ranks work on all updates, as in the published code."""
    tree = load_config(name).tree().repeat(3)
    shares = split_updates(tree, updates)
    assert len(shares) == updates
    parent, prompt = tree.parent[tree.edges], tree.prompt[tree.edges]
    counts = [
        [int(np.isin(parent[prompt == p], share).sum()) for p in range(3)] for share in shares
    ]
    assert all(len(set(of_prompts)) == 1 for of_prompts in counts)
    if edges:
        assert [of_prompts[0] for of_prompts in counts] == edges


def test_batch_size_does_not_matter(tiny, tmp_path):
    """Batches of 7 and 64 rows differ only by the order of fp32 sums."""
    results = []
    for rows, micro_batch in ((7, 1), (64, None)):
        sizes = {"sampling.batch_size": rows, "training.micro_batch_size": micro_batch}
        trainer = Trainer(tiny.with_changes(sizes), tmp_path)
        batch = trainer.collector.collect(1)
        update(
            trainer.config, trainer.method, trainer.policy, trainer.optimizer, batch, trainer.sigmas
        )
        parameters = torch.cat([p.flatten() for p in trainer.policy.parameters.values()])
        results.append((batch.images, batch.advantage, parameters))
    (images_a, advantage_a, parameters_a), (images_b, advantage_b, parameters_b) = results
    torch.testing.assert_close(images_a, images_b, atol=1e-4, rtol=0)
    torch.testing.assert_close(advantage_a, advantage_b, atol=1e-3, rtol=0)
    # Adam's first step has the length of the learning rate, 1e-4, whatever the gradient.
    assert (parameters_a - parameters_b).abs().mean() < 1e-6
