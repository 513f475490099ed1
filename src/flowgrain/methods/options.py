"""Groups of options that several methods share."""

from pydantic import field_validator

from flowgrain.core.tree import Planner
from flowgrain.methods.base import Method
from flowgrain.methods.plans import completed_trajectory, initial_noise, tail_indices
from flowgrain.methods.policy_gradient import PolicyGradient
from flowgrain.settings import IntTuple, Setting


def distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    """`values`, unchanged.

    Raises:
        ValueError: `values` is empty or contains a value twice.
    """
    if not values:
        raise ValueError("must not be empty. Remove it to use the method's default")
    if len(set(values)) != len(values):
        raise ValueError(f"contains a value twice. Use {sorted(set(values))}")
    return values


def without_clip_range(method: PolicyGradient, instead: str) -> None:
    """Check that `clip_range` is not set, because the loss of `method` has no clip.

    Args:
        method: the method.
        instead: setting or value that replaces the clip, for the message.

    Raises:
        ValueError: `clip_range` differs from the default.
    """
    if method.clip_range != type(method).model_fields["clip_range"].default:
        raise ValueError(
            f"clip_range={method.clip_range}: has no effect, because the loss has no clip. "
            f"Remove it, or use {instead}."
        )


class StepChoice(PolicyGradient):
    """Options of methods whose stochastic steps can be chosen."""

    sde_steps: IntTuple | None = Setting(
        None,
        "Grid indices of the stochastic steps (M), which are trained. Default: set by the method.",
        unit="grid indices",
    )

    @field_validator("sde_steps")
    @classmethod
    def _distinct_steps(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else distinct(value)

    def steps(self, end: int) -> tuple[int, ...]:
        """The stochastic steps: `sde_steps`, or all grid indices before `end`."""
        return self.sde_steps or tuple(range(end))

    def calibration_plan(self, tree: Planner) -> None:
        """See `PolicyGradient.calibration_plan`. Only the chosen steps are stochastic."""
        steps = self.steps(tree.num_steps)
        completed = {k + after for k in steps for after in (0, 1)}
        completed_trajectory(tree, tree.root(), steps, completed, order=self.tail_order)

    def last_possible_step(self, num_steps: int) -> int:
        """The last grid index that may be stochastic. The step into sigma = 0 is an ODE step."""
        return num_steps - 2

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        super().check(num_steps)
        last = self.last_possible_step(num_steps)
        for k in self.sde_steps or ():
            if not 0 <= k <= last:
                raise ValueError(
                    f"sde_steps={list(self.sde_steps or ())}: step {k} of a grid with "
                    f"sampling.num_steps={num_steps} cannot be stochastic. Use 0 to {last}."
                )


class SharedNoise(Method):
    """Option of methods that sample a group of trajectories."""

    shared_noise: bool = Setting(
        False, "Start all trajectories of a group from the same initial noise."
    )

    def roots(self, tree: Planner) -> list[int]:
        """Initial noise of every trajectory of a group."""
        return initial_noise(tree, self.group_size, self.shared_noise)


class CompressedTail(Method):
    """Option of methods whose trajectories end in an ODE tail."""

    tail_ratio: float = Setting(
        1.0,
        "ODE steps of the tail as a share of its grid steps (MixGRPO-Flash).",
        gt=0,
        le=1,
    )

    def finish(self, tree: Planner, node: int, index: int) -> None:
        """Add the ODE tail from `node` at grid index `index`, and its image."""
        if index < tree.num_steps:
            via = tail_indices(index, tree.num_steps, self.tail_ratio)
            node = tree.ode(node, via=via, order=self.tail_order)
        tree.image(node)

    def check_tail(self, num_steps: int, last_step: int) -> None:
        """Check that the tail options have an effect after the stochastic grid step `last_step`.

        Raises:
            ValueError: the tail is too short for the value of an option.
        """
        length = num_steps - 1 - last_step
        follows = "only 1 step follows" if length == 1 else "no step follows"
        for option, default in (("tail_order", 1), ("tail_ratio", 1.0)):
            value = getattr(self, option)
            if value != default and length <= 1:
                raise ValueError(
                    f"{option}={value}: has no effect, because {follows} the last stochastic step. "
                    f"Remove it, or end method.sde_steps before {num_steps - 2}."
                )
