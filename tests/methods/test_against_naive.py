"""Every method against its naive version: samples, log-probabilities, advantages and gradients.

Tolerances: the order of fp32 sums differs, 1e-5 on samples and 1e-4 on log-probabilities.
Advantages are divided by a spread of about 0.01, which gives 2e-3, and gradients inherit it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import naive_plans
import numpy as np
import pytest
import torch
from naive import Naive, NaiveEdge
from toy_trainer import STEP, compare_gradients, toy_config, toy_trainer

from flowgrain.core.cost import split_updates
from flowgrain.methods import METHODS
from flowgrain.training.policy_gradient import PolicyGradientLoss
from flowgrain.training.step import update


@dataclass(frozen=True)
class Case:
    """A method with changed options, and its naive rollout."""

    method: str
    plan: Callable[[Naive], None]
    options: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 5
    advantages: Callable[[Naive], None] = Naive.assign_advantages


PSI = [0.9, 0.7, 0.5, 0.5, 0.4]
CASES = {
    "g2rpo": Case("g2rpo", naive_plans.g2rpo, {"granularities": [1, 2, 3]}, 7),
    "g2rpo-cps": Case(
        "g2rpo", naive_plans.g2rpo, {"granularities": [1, 2], "sde_type": "cps", "eta": 0.6}
    ),
    "g2rpo-second-order": Case(
        "g2rpo", naive_plans.g2rpo, {"granularities": [1, 3], "tail_order": 2}, 7
    ),
    "flow_grpo": Case("flow_grpo", naive_plans.flow_grpo, {"updates_per_rollout": 2}),
    "flow_grpo-group-published-kl": Case(
        "flow_grpo", naive_plans.flow_grpo, {"std_scope": "group", "kl_form": "published"}
    ),
    "flow_grpo_fast": Case("flow_grpo_fast", naive_plans.flow_grpo_fast, {}, 8),
    "flow_grpo_fast-gaussian": Case(
        "flow_grpo_fast",
        naive_plans.flow_grpo_fast,
        {"cps_log_prob": "gaussian", "kl_form": "gaussian"},
        8,
    ),
    "flow_grpo_fast-short": Case(
        "flow_grpo_fast", naive_plans.flow_grpo_fast, {"tail_order": 2, "tail_ratio": 0.6}, 8
    ),
    "dancegrpo": Case("dancegrpo", naive_plans.dancegrpo),
    "mixgrpo": Case("mixgrpo", naive_plans.mixgrpo, {"window_size": 2}),
    "mixgrpo_flash": Case(
        "mixgrpo_flash", naive_plans.mixgrpo, {"window_size": 2, "tail_ratio": 0.6}, 8
    ),
    "mixgrpo_flash_star": Case(
        "mixgrpo_flash_star", naive_plans.mixgrpo, {"window_size": 2, "tail_ratio": 0.5}, 9
    ),
    "mixgrpo_flash-first-step": Case(
        "mixgrpo_flash",
        naive_plans.mixgrpo,
        {"window_size": 1, "tail_ratio": 0.8, "updates_per_rollout": 1},
        6,
    ),
    "densegrpo": Case("densegrpo", naive_plans.densegrpo, {"psi": PSI}),
    "densegrpo-state-jump": Case(
        "densegrpo",
        naive_plans.densegrpo,
        {"sde_type": "flow_sde", "dense_reward": "state", "completion_steps": 1},
    ),
    "densegrpo-joint-two": Case(
        "densegrpo",
        naive_plans.densegrpo,
        {"sde_type": "flow_sde", "comparison": "prompt", "completion_steps": 2},
    ),
    "densegrpo-second-order": Case(
        "densegrpo", naive_plans.densegrpo, {"psi": PSI, "completion_steps": 3, "tail_order": 2}
    ),
    "tempflow_grpo": Case("tempflow_grpo", naive_plans.tempflow_grpo, {"seeds": 2}),
    "tempflow_grpo-prompt-groups": Case(
        "tempflow_grpo", naive_plans.tempflow_grpo, {"seeds": 2, "comparison": "step"}
    ),
    "tempflow_grpo-short": Case(
        "tempflow_grpo",
        naive_plans.tempflow_grpo,
        {"seeds": 1, "tail_order": 2, "tail_ratio": 0.5},
        6,
    ),
    "grpo_guard": Case("grpo_guard", naive_plans.flow_grpo),
    "branchgrpo": Case(
        "branchgrpo", naive_plans.branchgrpo, {"split_steps": [0, 2], "group_size": 4}
    ),
    "branchgrpo-softmax": Case(
        "branchgrpo",
        naive_plans.softmax_branchgrpo,
        {"split_steps": [0, 2], "group_size": 9, "split_fan": 3, "node_value": "softmax"},
    ),
    "flow_dppo": Case("flow_dppo", naive_plans.flow_grpo, {"trust_region": 1e-4}),
    "tp_grpo": Case("tp_grpo", naive_plans.tp_grpo, {"group_size": 4}, 6),
    "stepwise_flow_grpo": Case("stepwise_flow_grpo", naive_plans.densegrpo),
    "e_grpo": Case(
        "e_grpo", naive_plans.e_grpo, {"sde_steps": [0, 1, 3], "merged_steps": [2, 1, 3]}, 7
    ),
    "ddpo": Case("ddpo", naive_plans.flow_grpo, advantages=naive_plans.ddpo_advantages),
    "ddpo-own-statistics": Case(
        "ddpo",
        naive_plans.flow_grpo,
        {"min_count": 3},
        advantages=lambda naive: naive_plans.ddpo_advantages(naive, own=True),
    ),
    "ddpo-score": Case(
        "ddpo",
        naive_plans.flow_grpo,
        {"estimator": "score", "updates_per_rollout": 1},
        advantages=naive_plans.ddpo_advantages,
    ),
}


def case_trainer(case: Case, out):
    # Many updates of few samples would be empty.
    published = METHODS.get(case.method)().updates_per_rollout
    updates = published if published == "per_step" else min(published, 2)
    values = {"updates_per_rollout": updates, **case.options}
    options = {f"method.{name}": value for name, value in values.items()}
    config = toy_config(case.method, {"sampling.num_steps": case.num_steps, **options})
    return toy_trainer(config, out)


def step_weights(naive: Naive) -> list[float]:
    """TempFlow-GRPO's weight of every step: its std, with mean 1 over the trained steps."""
    zero = torch.zeros(1)
    std = [naive.transition(zero, zero, k)[1] for k in range(naive.num_steps - 1)]
    return [value / np.mean(std) for value in std]


def assert_same_rollout(batch, naive: Naive) -> None:
    """The same edges, their parents and images."""
    tree, rollout, edges = batch.rollout.tree, batch.rollout, naive.edges
    assert [prompt.text for prompt in batch.prompts] == naive.texts
    assert len(edges) == len(tree.edges)
    close = {"atol": 1e-5, "rtol": 1e-5}
    x_next, x = torch.stack([e.x_next for e in edges]), torch.stack([e.x for e in edges])
    torch.testing.assert_close(rollout.at(tree.edges), x_next, **close)
    torch.testing.assert_close(rollout.at(tree.parent[tree.edges]), x, **close)
    images = sorted(map(tuple, rollout.at(tree.leaves).flatten(1).tolist()))
    # Equal images of the naive version are counted once, after rounding.
    expected = sorted({tuple(round(v, 4) for v in x.flatten().tolist()) for x in naive.images})
    assert len(images) == len(expected)
    np.testing.assert_allclose(images, expected, atol=2e-4)


def assert_same_log_probs(trainer, batch, edges: list[NaiveEdge]) -> None:
    tree, policy = batch.rollout.tree, trainer.policy
    losses = PolicyGradientLoss(trainer.config, trainer.method, policy, batch, trainer.sigmas)
    transition, of_parents, _ = losses._transition(tree.trained_parents, policy.train_velocity)
    assert of_parents.tolist() == tree.edges.tolist()
    log_prob = transition.log_prob(batch.rollout.at(tree.edges))
    expected = torch.tensor([e.log_prob for e in edges])
    torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_naive_version(case, tmp_path, monkeypatch):
    trainer = case_trainer(case, tmp_path)
    naive = Naive(trainer)
    case.plan(naive)
    case.advantages(naive)
    naive.store_old_velocities()
    batch, edges = trainer.collector.collect(STEP), naive.edges

    assert_same_rollout(batch, naive)
    assert_same_log_probs(trainer, batch, edges)
    expected = torch.tensor([e.advantage for e in edges])
    torch.testing.assert_close(batch.advantage, expected, atol=2e-3, rtol=2e-3)

    updates = trainer.method.updates_per_rollout
    tree = batch.tree
    parents = tree.parent[tree.edges]
    shares = [
        [edge for edge, parent in zip(edges, parents, strict=True) if parent in rows]
        for rows in split_updates(tree, updates)
    ]
    weights = step_weights(naive) if case.method == "tempflow_grpo" else None

    def naive_loss(number: int):
        guard = case.method == "grpo_guard"
        losses = [naive.loss(edge, guard, weights) for edge in shares[number]]
        return sum(losses) / len(losses)

    distances = compare_gradients(trainer, monkeypatch, naive_loss)
    metrics = update(
        trainer.config, trainer.method, trainer.policy, trainer.optimizer, batch, trainer.sigmas
    )
    assert len(distances) == len(shares)
    assert max(distances) < 2e-3
    if updates == 2:
        assert metrics["clip_fraction/later_updates"] > 0
