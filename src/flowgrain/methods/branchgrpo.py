"""BranchGRPO (arXiv 2509.06040)."""

from typing import Literal

import numpy as np
import torch
from pydantic import PrivateAttr, field_validator
from torch import Tensor

from flowgrain.core.credit import Normalization, softmax_outcome
from flowgrain.core.rollout import Noise
from flowgrain.core.tree import ROOT, Planner, Tree
from flowgrain.methods.base import LearningRates, Observation, register
from flowgrain.methods.options import CompressedTail, StepChoice, distinct
from flowgrain.methods.policy_gradient import SdeType
from flowgrain.settings import IntTuple, Setting


@register
class BranchGRPO(StepChoice, CompressedTail):
    """BranchGRPO: a stochastic tree that splits at several steps.

    The value of an edge is the mean reward of the leaves below it.
    """

    name = "branchgrpo"
    title = "BranchGRPO"
    paper = "2509.06040"
    summary = (
        "The tree splits at several steps. "
        "The value of an edge is the mean reward of the images below it."
    )
    config_defaults = {"sampling": {"num_steps": 20}}  # section 5

    learning_rates = LearningRates(full=1e-5)  # published code

    group_size: int = 16  # section 5: 2^4 leaves
    sde_type: SdeType = "dance_sde"  # published code
    eta: float = 0.3  # published code
    clip_range: float = 1e-3  # published code
    updates_per_rollout: int | Literal["per_step"] = 37  # published code, see the method's page
    split_steps: IntTuple = Setting(
        (0, 3, 6, 9), "Grid indices at which the tree splits.", unit="grid indices"
    )  # section 5
    split_fan: int = Setting(2, "Children of a split.", unit="branches", ge=2, le=1000)  # section 5

    node_value: Literal["mean", "softmax"] = Setting(
        "mean",
        "Value of a state: mean reward of the images below it (mean), or mean of its children's "
        "values, weighted by the softmax of their log-probabilities (softmax).",
    )  # published code
    _log_prob: Tensor | None = PrivateAttr(None)

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        steps = self.steps(tree.num_steps - 1)
        nodes, end = [tree.root()], max(steps) + 1
        for k in range(end):
            fan = self.split_fan if k in self.split_steps else 1
            if k in steps:
                nodes = [branch for node in nodes for branch in tree.sde(node, fan)]
            else:
                nodes = [tree.ode(node, to=k + 1) for node in nodes]
        for node in nodes:
            self.finish(tree, node, end)

    def observe(self, observation: Observation) -> None:
        if self.node_value == "softmax":
            self._log_prob = branch_log_prob(observation.tree, observation.noise)

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        if self.node_value == "mean":
            return super().credit(tree, rewards, how)
        if self._log_prob is None or len(self._log_prob) != len(tree):
            raise ValueError("node_value=softmax: observe the rollout before its credit.")
        return softmax_outcome(tree, rewards, how, self._log_prob)

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        steps = self.steps(num_steps - 1)
        self.check_tail(num_steps, max(steps))
        if self.node_value == "softmax" and self.cps_log_prob == "squared_error":
            raise ValueError(
                "node_value=softmax: the weights are those of the Gaussian. "
                "Use method.cps_log_prob=gaussian."
            )
        if not set(self.split_steps) <= set(steps):
            raise ValueError(
                f"split_steps={list(self.split_steps)}: a split needs a stochastic step. "
                f"Use some of {list(steps)}."
            )
        leaves = self.split_fan ** len(self.split_steps)
        if self.group_size != leaves:
            raise ValueError(
                f"group_size={self.group_size}: method.split_fan and method.split_steps give "
                f"{leaves} leaves. Use method.group_size={leaves}."
            )

    @field_validator("split_steps")
    @classmethod
    def _distinct_splits(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return distinct(value)


def branch_log_prob(tree: Tree, noise: Noise) -> Tensor:
    """Log-probabilities [N] of the steps to rows with siblings, without constants. 0 elsewhere.

    A step drew x_next = mean + std z, so that its log-probability is -mean(z^2) / 2, up to
    constants that siblings share. Every rank can compute it from the noise alone.
    """
    log_prob = torch.zeros(len(tree), dtype=torch.float64)
    children = np.bincount(tree.parent[tree.parent != ROOT], minlength=len(tree))
    for row in np.flatnonzero(tree.stochastic & (children[tree.parent] > 1)):
        z = noise(tree.prompt[[row]], tree.draw[[row]])
        log_prob[row] = -z.double().square().mean() / 2
    return log_prob
