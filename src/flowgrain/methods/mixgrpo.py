"""MixGRPO (arXiv 2507.21802)."""

from flowgrain.core.tree import Planner
from flowgrain.methods.base import register
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

    shared_noise: bool = True  # published code

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        window = self.window(tree.num_steps, step, seed)
        for root in self.roots(tree):
            self.finish(tree, trajectory(tree, root, window.stop, window, window), window.stop)

    def published_passes(self, num_steps: int) -> int:
        end = self.window(num_steps, 1, 0).stop
        return self.group_size * (end + len(tail_indices(end, num_steps, self.tail_ratio)))
