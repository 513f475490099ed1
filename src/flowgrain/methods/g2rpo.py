"""G2RPO (arXiv 2510.01982)."""

from pydantic import field_validator
from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization
from flowgrain.core.tree import CoarseGrid, Planner, Tree
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.options import StepChoice, distinct
from flowgrain.settings import IntTuple, Setting


@register
class G2RPO(StepChoice):
    """Granular GRPO: branches from one ODE trajectory.

    The trajectory branches at each stochastic step. Every branch is finished at every granularity.
    """

    name = "g2rpo"
    title = "G2RPO"
    paper = "2510.01982"
    summary = (
        "One ODE trajectory branches at every stochastic step. The branches of a step differ only "
        "in its noise. Each branch is finished at every granularity and scored."
    )

    learning_rates = LearningRates(full=2e-6)  # appendix and published code

    granularities: IntTuple = Setting(
        (1, 2, 3), "Strides of the ODE completions of every branch (Lambda).", unit="grid steps"
    )  # section 4.1
    coarse_grid: CoarseGrid = Setting(
        "stride", "Grid of the coarse ODEs: of the published code (stride), or of eq. 10 (exact)."
    )
    anchor_image: bool = Setting(
        True, "Also decode and score the image of the ODE trajectory itself."
    )

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        steps, anchor = self._steps(tree.num_steps), tree.root()
        for k in range(tree.num_steps):
            for branch in tree.sde(anchor, fan=self.group_size) if k in steps else ():
                for channel, stride in enumerate(self.granularities):
                    leaf = tree.ode(
                        branch, stride=stride, order=self.tail_order, grid=self.coarse_grid
                    )
                    tree.image(leaf, channel)
            anchor = tree.ode(anchor, to=k + 1)
        if self.anchor_image:
            tree.image(anchor)

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        return credit.granular(tree, rewards, how)

    def _steps(self, num_steps: int) -> tuple[int, ...]:
        return self.steps(num_steps // 2)  # appendix and published code: the first half of the grid

    def published_passes(self, num_steps: int) -> int:
        steps = self._steps(num_steps)
        tails = sum(
            -(-(num_steps - 1 - k) // stride) for k in steps for stride in self.granularities
        )
        return num_steps + self.group_size * (len(steps) + tails)

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        for stride in self.granularities:
            if not 1 <= stride < num_steps:
                raise ValueError(
                    f"granularities={list(self.granularities)}: {stride} is not a stride of a grid "
                    f"with sampling.num_steps={num_steps}. Use 1 (the full grid) to "
                    f"{num_steps - 1}."
                )

    @field_validator("granularities")
    @classmethod
    def _distinct_strides(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return distinct(value)
