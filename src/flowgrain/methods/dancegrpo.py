"""DanceGRPO (arXiv 2505.07818)."""

from typing import Literal

import numpy as np

from flowgrain.core.tree import Planner
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.options import CompressedTail, SharedNoise, StepChoice
from flowgrain.methods.plans import trajectory
from flowgrain.methods.policy_gradient import SdeType
from flowgrain.settings import Setting


@register
class DanceGRPO(StepChoice, SharedNoise, CompressedTail):
    """DanceGRPO: one initial noise per group, noise at every step, training on some steps.

    The trained steps are drawn for every rollout.
    """

    name = "dancegrpo"
    title = "DanceGRPO"
    paper = "2505.07818"
    summary = (
        "The trajectories of a group start from the same noise and are compared by their final "
        "images. Every trained step of a trajectory has the same advantage."
    )
    learning_rates = LearningRates(full=1e-5, lora=3e-4)  # published code

    sde_type: SdeType = "dance_sde"  # section 3
    eta: float = 0.3  # section 4
    updates_per_rollout: int | Literal["per_step"] = 3  # published code: every 4 of 12 samples
    shared_noise: bool = True  # section 3
    timestep_fraction: float = Setting(
        0.6, "Share of the stochastic steps to train on, drawn for every rollout.", gt=0, le=1
    )  # section 4

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        steps = self.steps(tree.num_steps - 1)
        count = max(1, int(len(steps) * self.timestep_fraction))
        trained = np.random.default_rng([seed, step]).choice(steps, count, replace=False)
        end = max(steps) + 1
        for root in self.roots(tree):
            self.finish(tree, trajectory(tree, root, end, steps, trained), end)

    @property
    def plan_varies(self) -> bool:
        return self.timestep_fraction < 1

    def published_passes(self, num_steps: int) -> int:
        return num_steps * self.group_size

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        self.check_tail(num_steps, max(self.steps(num_steps - 1)))
