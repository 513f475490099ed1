"""ReFL (arXiv 2304.05977)."""

import numpy as np
from torch import Tensor

from flowgrain.core.tree import Planner
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.plans import initial_noise
from flowgrain.methods.reward_gradient import RewardGradient
from flowgrain.settings import Setting


@register
class ReFL(RewardGradient):
    """ReFL: the gradient of the reward of an x0 estimate, through one random late step.

    The image is decoded from the x0 estimate of a random late state.
    """

    name = "refl"
    title = "ReFL"
    paper = "2304.05977"
    summary = (
        "Every image is decoded from the x0 estimate of a random late state, "
        "and trained by the gradient of its own reward."
    )
    config_defaults = {"sampling": {"num_steps": 40}}  # published code
    learning_rates = LearningRates(full=1e-5)  # published code

    first_step: float = Setting(
        0.75, "The random step is in the grid from this share of its steps to its end.", ge=0, lt=1
    )  # published code: steps 30 to 39 of 40
    reward_cap: float | None = Setting(
        2.0,
        "An image with a larger total reward has no gradient, in the scale of the reward. "
        "Default: the value for ImageReward. null: no cap.",
        ge=-1e6,
        le=1e6,
    )  # published code: relu(2 - r)
    loss_scale: float = Setting(
        1e-3, "Factor of the loss of the reward (lambda).", gt=0, le=1e6
    )  # published code

    @property
    def gradient_steps(self) -> int:
        return 1

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        random = np.random.default_rng([seed, step])
        first = int(self.first_step * tree.num_steps)
        for root in initial_noise(tree, self.group_size, shared=False):
            late = tree.ode(root, to=int(random.integers(first, tree.num_steps)))
            tree.keep(late)
            tree.image(tree.ode(late, via=[tree.num_steps]))  # one step into sigma = 0: x0_hat

    @property
    def plan_varies(self) -> bool:
        return True

    def loss(self, reward: Tensor) -> Tensor:
        missing = -reward if self.reward_cap is None else (self.reward_cap - reward).relu()
        return self.loss_scale * missing
