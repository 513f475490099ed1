"""TempFlow-GRPO (arXiv 2508.04324)."""

from collections.abc import Collection

import torch
from torch import Tensor

from flowgrain.core import objective
from flowgrain.core.credit import ComparisonGroup, Scope
from flowgrain.core.objective import KLForm, Objective
from flowgrain.core.sde import Kernel, Step
from flowgrain.core.tree import Planner
from flowgrain.methods.base import register
from flowgrain.methods.flow_grpo import FlowGRPODefaults
from flowgrain.methods.options import CompressedTail
from flowgrain.settings import Setting


@register
class TempFlowGRPO(FlowGRPODefaults, CompressedTail):
    """TempFlow-GRPO: branches from ODE trajectories, with a loss weighted by the step's noise."""

    name = "tempflow_grpo"
    title = "TempFlow-GRPO"
    paper = "2508.04324"
    summary = (
        "An ODE trajectory branches at every step. The branches of a step differ only in its noise."
    )

    group_size: int = 6  # published code: branches per trajectory and step
    seeds: int = Setting(
        4,
        "ODE trajectories per prompt, each from its own noise.",
        unit="trajectories",
        ge=1,
        le=10_000,
    )  # published code
    comparison: ComparisonGroup = "parent"  # published code: the branches of one trajectory
    std_scope: Scope = "group"  # std_g in the paper's advantage
    kl_weight: float = 0.004  # published code, for GenEval
    kl_form: KLForm = "gaussian"  # published code: the exact KL

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        steps = self.steps(tree.num_steps - 1)
        for trunk in [tree.root() for _ in range(self.seeds)]:
            self._branch(tree, trunk, steps)

    def _branch(self, tree: Planner, trunk: int, steps: Collection[int]) -> None:
        for k in range(max(steps) + 1):
            for branch in tree.sde(trunk, fan=self.group_size) if k in steps else ():
                self.finish(tree, branch, k + 1)
            trunk = tree.ode(trunk, to=k + 1)

    def objective(self, sigmas: Tensor) -> Objective:
        weights = noise_weights(self.kernel(sigmas), sigmas, self.steps(len(sigmas) - 2))
        return objective.clipped(self.clip_range, self.kl_weight, self.kl_form_of_kernel, weights)

    def published_passes(self, num_steps: int) -> int:
        steps = self.steps(num_steps - 1)
        tails = sum(num_steps - 1 - k for k in steps)
        return self.seeds * (max(steps) + 1 + self.group_size * tails)


def noise_weights(kernel: Kernel, sigmas: Tensor, steps: Collection[int]) -> tuple[float, ...]:
    """Std of `kernel` at every grid step [T], scaled to mean 1 over `steps` (section 4.2)."""
    sigmas = sigmas.cpu()
    index = torch.arange(len(sigmas) - 1)
    zeros = torch.zeros(len(index), 1)
    std = kernel(zeros, zeros, Step.on(sigmas, index, index + 1)).std
    return tuple((std / std[sorted(steps)].mean()).tolist())
