"""E-GRPO (arXiv 2601.00423)."""

from typing import Literal

from pydantic import field_validator

from flowgrain.core.tree import Planner
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.options import StepChoice
from flowgrain.settings import IntTuple, Setting


@register
class EGRPO(StepChoice):
    """E-GRPO: branches from one ODE trajectory by stochastic steps that merge grid steps.

    A step with little entropy is merged with the steps after it into one stochastic step with more
    entropy. All other steps are ODE steps.
    """

    name = "e_grpo"
    title = "E-GRPO"
    paper = "2601.00423"
    summary = (
        "One ODE trajectory branches at every stochastic step. A stochastic step may merge several "
        "grid steps. The branches of a step differ only in its noise. Each branch is finished by "
        "the ODE and scored."
    )

    learning_rates = LearningRates(full=1e-5)  # published code; older scripts: 2e-6

    sde_steps: IntTuple | None = (0, 1, 2, 4)  # published code
    updates_per_rollout: int | Literal["per_step"] = "per_step"  # published code
    merged_steps: IntTuple = Setting(
        (1, 1, 2, 3),
        "Grid steps that each stochastic step merges, in the order of sde_steps.",
        unit="grid steps",
    )  # published code

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        lengths = dict(zip(self.steps(tree.num_steps - 1), self.merged_steps, strict=True))
        trunk = tree.root()
        for k in range(tree.num_steps):
            if k in lengths:
                for branch in tree.sde(trunk, self.group_size, length=lengths[k]):
                    tree.image(tree.ode(branch, order=self.tail_order))
            trunk = tree.ode(trunk, to=k + 1)
        tree.image(trunk)

    def published_passes(self, num_steps: int) -> int:
        # The published completion of a merged step has as many steps as of a step of length 1.
        passes = sum(num_steps - k for k in self.steps(num_steps - 1))
        return num_steps + self.group_size * passes

    def check(self, num_steps: int) -> None:
        steps = self.steps(num_steps - 1)
        if len(self.merged_steps) != len(steps):
            raise ValueError(
                f"merged_steps={list(self.merged_steps)}: has {len(self.merged_steps)} lengths. "
                f"Use {len(steps)}, one for each of method.sde_steps={list(steps)}."
            )
        last = self.last_possible_step(num_steps) + 1
        for k, length in zip(steps, self.merged_steps, strict=True):
            if k < last < k + length:
                raise ValueError(
                    f"merged_steps={list(self.merged_steps)}: the step from grid index {k} ends at "
                    f"{k + length}, but must end at {last} or before with "
                    f"sampling.num_steps={num_steps}. Use at most {last - k}."
                )
        super().check(num_steps)

    @field_validator("merged_steps")
    @classmethod
    def _positive_lengths(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value, default=0) < 1:
            raise ValueError("must not be empty, and every length must be at least 1")
        return value
