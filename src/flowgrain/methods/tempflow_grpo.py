"""TempFlow-GRPO (arXiv 2508.04324)."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from flowgrain.core import objective
from flowgrain.core.credit import Scope
from flowgrain.core.objective import Objective
from flowgrain.core.sde import Kernel, Step
from flowgrain.core.tree import Planner
from flowgrain.methods.base import register
from flowgrain.methods.flow_grpo import FlowGRPODefaults
from flowgrain.methods.options import CompressedTail


@register
class TempFlowGRPO(FlowGRPODefaults, CompressedTail):
    """TempFlow-GRPO: branches from an ODE trajectory, with a loss weighted by the step's noise."""

    name = "tempflow_grpo"
    title = "TempFlow-GRPO"
    paper = "2508.04324"
    summary = (
        "One ODE trajectory branches at every step. "
        "The branches of a step differ only in its noise."
    )

    group_size: int = 6  # section 5: 6 branches
    std_scope: Scope = "group"  # std_g in the paper's advantage
    updates_per_rollout: int | Literal["per_step"] = 1  # own choice; published: 2

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        steps = self.steps(tree.num_steps - 1)
        trunk = tree.root()
        for k in range(max(steps) + 1):
            for branch in tree.sde(trunk, fan=self.group_size) if k in steps else ():
                self.finish(tree, branch, k + 1)
            trunk = tree.ode(trunk, to=k + 1)

    def objective(self, sigmas: Tensor) -> Objective:
        steps = self.steps(len(sigmas) - 2)
        weights = noise_weights(self.kernel(sigmas), sigmas, steps)
        return objective.weighted(super().objective(sigmas), weights)

    def published_passes(self, num_steps: int) -> int:
        steps = self.steps(num_steps - 1)
        return num_steps + self.group_size * sum(num_steps - k for k in steps)


def noise_weights(kernel: Kernel, sigmas: Tensor, steps: Collection[int]) -> tuple[float, ...]:
    """Std of `kernel` at every grid step [T], scaled to mean 1 over `steps` (section 4.2)."""
    sigmas = sigmas.cpu()
    index = torch.arange(len(sigmas) - 1)
    zeros = torch.zeros(len(index), 1)
    std = kernel(zeros, zeros, Step.on(sigmas, index, index + 1)).std
    return tuple((std / std[sorted(steps)].mean()).tolist())
