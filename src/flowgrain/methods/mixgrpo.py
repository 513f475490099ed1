"""MixGRPO (arXiv 2507.21802)."""

from typing import Literal

from flowgrain.core.tree import Planner
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.options import CompressedTail, SharedNoise
from flowgrain.methods.plans import tail_indices, trajectory
from flowgrain.methods.window import WindowChoice


@register
class MixGRPO(WindowChoice, SharedNoise, CompressedTail):
    """MixGRPO: ODE steps, a sliding window of stochastic steps, and an ODE tail."""

    name = "mixgrpo"
    title = "MixGRPO"
    paper = "2507.21802"
    summary = (
        "The trajectories of a group differ only in the noise of the window. They are compared by "
        "their final images, and every step of the window has the same advantage."
    )
    config_defaults = {"sampling": {"num_steps": 25}}  # section 4

    learning_rates = LearningRates(full=1e-5)  # published code

    shared_noise: bool = True  # published code
    updates_per_rollout: int | Literal["per_step"] = 4  # published code: every 3 of 12 samples
    reward_weights: Literal["as_given", "sum_to_one"] = "sum_to_one"  # published code

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        window = self.window(tree.num_steps, step, seed)
        for root in self.roots(tree):
            self.finish(tree, trajectory(tree, root, window.stop, window, window), window.stop)

    def published_passes(self, num_steps: int) -> int:
        end = self.window(num_steps, 1, 0).stop
        tail = len(tail_indices(end, num_steps, self.tail_ratio))
        # A compressed tail of n points in the published code has n - 1 steps.
        return self.group_size * (end + tail - (self.tail_ratio < 1))
