"""Base classes of methods, and the registry of methods.

A method is one class with typed settings, a plan, a credit and an objective.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, PrivateAttr, Strict, field_validator
from torch import Tensor

from flowgrain.core import credit, objective
from flowgrain.core.credit import ComparisonGroup, Normalization, RewardMix, Scope
from flowgrain.core.objective import KLForm, Objective
from flowgrain.core.sde import (
    CPS,
    CalibratedSDE,
    DanceSDE,
    FlowSDE,
    Kernel,
    Step,
    flow_strength,
)
from flowgrain.core.tree import Planner, Tree
from flowgrain.methods.plans import completed_trajectory
from flowgrain.registry import Registry
from flowgrain.settings import Section, Setting, SettingsError

METHODS: Registry[type["Method"]] = Registry("method", "flowgrain.methods")
M = TypeVar("M", bound=type["Method"])

SdeType = Literal["flow_sde", "dance_sde", "cps", "calibrated_sde"]
FloatTuple = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Strict(False)]


def register(cls: M) -> M:
    """Class decorator that makes a method available under its `name`."""
    if not getattr(cls, "name", ""):
        raise SettingsError(f"{cls.__name__} has no name. Set the class attribute `name`.")
    METHODS.register(cls.name)(cls)
    return cls


def build_method(values: Mapping[str, Any]) -> "Method":
    """The method named `values["name"]`, with the other values as its options.

    Raises:
        SettingsError: there is no such method.
        pydantic.ValidationError: an option is not valid.
    """
    options = dict(values)
    return METHODS.get(str(options.pop("name"))).model_validate(options)


class Method(Section, ABC):
    """A training method: its options and its behavior.

    The default values of the options are the values of the method's paper. A subclass implements
    `plan` and `credit`. Derive from `PolicyGradient` to train stochastic steps, or from
    `ForwardProcess` to train on finished images.
    """

    name: ClassVar[str]
    """Name on the command line and in files."""
    title: ClassVar[str] = ""
    """Name in prose, such as "G2RPO"."""
    paper: ClassVar[str] = ""
    """arXiv identifier."""
    summary: ClassVar[str] = ""
    """Explanation of the tree picture in a report."""
    config_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Values of the paper for settings of other sections, by section."""

    group_size: int = Setting(
        12, "Samples per prompt that are compared with each other (G).", unit="samples", ge=2
    )
    updates_per_rollout: int | Literal["per_step"] = Setting(
        1,
        'Optimizer updates per rollout, or "per_step" for one update per stochastic step.',
        unit="updates",
    )
    kl_weight: float = Setting(
        0.0, "Weight of the KL to the reference model (beta). 0: no KL.", ge=0
    )
    tail_order: Literal[1, 2] = Setting(
        1, "Order of the ODE steps after the last stochastic step. 2 is DPM-Solver++(2M)."
    )
    reward_mix: RewardMix = Setting(
        "advantage",
        "How several rewards are combined: weighted sum of their advantages (advantage), or of the "
        "rewards (reward).",
    )
    std_scope: Scope = Setting(
        "group",
        "Standard deviation that normalizes advantages: of the comparison group (group), or of the "
        "whole batch (global).",
    )
    std_unbiased: bool = Setting(True, "Divide by n - 1 instead of n in the standard deviation.")
    std_epsilon: float = Setting(1e-8, "Constant added to the standard deviation.", gt=0)
    advantage_clip: float = Setting(5.0, "Advantages are clamped to this absolute value.", gt=0)

    @abstractmethod
    def plan(self, tree: Planner, step: int, seed: int) -> None:
        """Write the tree of one prompt.

        Args:
            tree: planner of the tree. `tree.num_steps` is the length of the sampling grid.
            step: training step, from 1.
            seed: seed of the run.
        """

    @abstractmethod
    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """Advantages [E] of the trained edges, or [I] of the images if the method trains on images.

        Args:
            tree: tree of all prompts.
            rewards: [I] rewards of the leaves. NaN marks an image without a score.
            how: normalization of values to advantages.
        """

    @property
    def plan_varies(self) -> bool:
        """Whether the tree changes between training steps."""
        return False

    def published_passes(self, num_steps: int) -> int:
        """Sampling forward passes per prompt in the published code. 0: unknown."""
        return 0

    def check(self, num_steps: int) -> None:
        """Check the options against the length of the sampling grid.

        Raises:
            ValueError: an option does not fit. The message starts with the option and its value.
        """

    def normalization(self) -> Normalization:
        """Normalization of values to advantages."""
        return Normalization(self.std_scope, self.std_unbiased, self.std_epsilon)

    def state_dict(self) -> dict[str, Any]:
        """State of the method that a checkpoint stores, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        if state:
            raise ValueError(f"method {self.name!r} has no state {', '.join(state)}")

    @field_validator("updates_per_rollout")
    @classmethod
    def _at_least_one_update(cls, value: int | str) -> int | str:
        if value != "per_step" and int(value) < 1:
            raise ValueError("must be at least 1, or per_step")
        return value


class Calibration(Section):
    """Calibration of the noise strengths psi of `calibrated_sde` (DenseGRPO section 4.2)."""

    rounds: int = Setting(
        20, "Number of rounds. Each round changes every psi by `step`.", unit="rounds", ge=1
    )
    samples: int = Setting(
        64, "Trajectories per round, each with its own prompt (N).", unit="samples", ge=2
    )
    step: float = Setting(0.01, "Change of psi per round.", gt=0)
    balance: float = Setting(
        0.25, "A step is balanced if |gains - losses| / N is below this value.", gt=0, le=1
    )


class PolicyGradient(Method):
    """A method that trains stochastic steps by the ratio of their transition probabilities."""

    sde_type: SdeType = Setting("flow_sde", "Transition kernel of the stochastic steps.", keep=True)
    eta: float = Setting(0.7, "Noise strength of the stochastic steps.", gt=0)
    psi: FloatTuple | None = Setting(
        None,
        "Noise strength of every grid step for calibrated_sde. "
        "Default: calibrated before the first training step.",
        keep=True,
    )
    calibration: Calibration = Setting(Calibration(), "Calibration of psi for calibrated_sde.")
    clip_range: float = Setting(1e-4, "PPO clip range of the ratio.", gt=0)
    kl_form: KLForm = Setting(
        "gaussian",
        "Exact Gaussian KL (gaussian), or the form of Flow-GRPO's published code (published).",
    )
    comparison: ComparisonGroup = Setting(
        "step",
        "Comparison group: edges of a prompt at the same grid step (step), "
        "or all edges of a prompt (prompt, Stepwise-Flow-GRPO).",
    )
    best_of: int = Setting(
        0,
        "Samples per comparison group to train on: half of them the best, half the worst. 0: all.",
        unit="samples",
        ge=0,
    )
    _psi: tuple[float, ...] | None = PrivateAttr(None)

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """Flow-GRPO's credit: the mean reward of the images below an edge, normalized."""
        return credit.outcome(tree, rewards, how)

    def normalization(self) -> Normalization:
        """Normalization of values to advantages."""
        return Normalization(self.std_scope, self.std_unbiased, self.std_epsilon, self.comparison)

    def kernel(self, sigmas: Tensor) -> Kernel:
        """The transition kernel of the stochastic steps on the grid `sigmas` [T + 1]."""
        if self.sde_type == "calibrated_sde":
            return CalibratedSDE(self._psi or self.psi or self.initial_psi(sigmas))
        if self.sde_type == "dance_sde":
            return DanceSDE(self.eta)
        return CPS(self.eta) if self.sde_type == "cps" else FlowSDE(self.eta)

    def objective(self, sigmas: Tensor) -> Objective:
        """The loss of a trained edge.

        Default: PPO's clipped surrogate and the KL to the reference.
        """
        return objective.clipped(self.clip_range, self.kl_weight, self.kl_form)

    def initial_psi(self, sigmas: Tensor) -> tuple[float, ...]:
        """Noise strengths [T] at the start of the calibration, equal to Flow-SDE(eta)."""
        index = torch.arange(len(sigmas) - 1)
        step = Step.on(sigmas.cpu(), index, index + 1)
        return tuple(flow_strength(self.eta, step).tolist())

    @property
    def needs_calibration(self) -> bool:
        """Whether psi must be calibrated before the first training step."""
        return self.sde_type == "calibrated_sde" and self.psi is None and self._psi is None

    def calibration_plan(self, tree: Planner) -> None:
        """Write the tree of a calibration round: a trajectory with completions of all states."""
        steps = range(tree.num_steps)
        completed_trajectory(
            tree, tree.root(), steps, range(tree.num_steps + 1), order=self.tail_order
        )

    def set_psi(self, psi: Sequence[float]) -> None:
        """Set the calibrated noise strengths [T]."""
        self._psi = tuple(psi)

    def state_dict(self) -> dict[str, Any]:
        """The calibrated psi, once it exists."""
        return {} if self._psi is None else {"psi": list(self._psi)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the calibrated psi."""
        if "psi" in state:
            self.set_psi(state["psi"])

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        if self.best_of % 2 or self.best_of > self.group_size:
            raise ValueError(
                f"best_of={self.best_of}: not an even number up to method.group_size="
                f"{self.group_size}. Use such a number, or 0 for all samples."
            )
        if self.psi is not None and self.sde_type != "calibrated_sde":
            raise ValueError(
                f"psi={list(self.psi)}: has no effect with method.sde_type={self.sde_type}. "
                "Remove it, or use method.sde_type=calibrated_sde."
            )
        if self.psi is not None and len(self.psi) != num_steps:
            raise ValueError(
                f"psi={list(self.psi)}: has {len(self.psi)} values. "
                f"Use {num_steps} values, one for each of the sampling.num_steps={num_steps} steps."
            )
        unused = self.sde_type != "calibrated_sde" or self.psi is not None
        if unused and self.calibration != type(self).model_fields["calibration"].default:
            raise ValueError(
                "calibration: has no effect, because psi is not calibrated. "
                "Remove it, or use method.sde_type=calibrated_sde without method.psi."
            )
        if self.sde_type == "cps" and self.eta > 1:
            raise ValueError(
                f"eta={self.eta}: method.sde_type=cps rotates by eta * 90 degrees. Use at most 1."
            )


class ForwardProcess(Method):
    """A method that trains on finished images by adding noise to them again.

    The old policy samples. After every rollout it moves toward the trained policy. The trees have
    no trained edges.
    """

    @abstractmethod
    def loss(
        self, v: Tensor, v_old: Tensor, target: Tensor, sigma: Tensor, advantage: Tensor
    ) -> Tensor:
        """Loss [B] of noised images.

        Args:
            v: [B, *L] velocity of the trained policy.
            v_old: [B, *L] velocity of the old policy.
            target: [B, *L] eps - x0.
            sigma: [B] noise levels.
            advantage: [B].
        """

    @abstractmethod
    def num_levels(self, num_steps: int) -> int:
        """Number of noise levels that are drawn for every image."""

    @abstractmethod
    def decay(self, step: int) -> float:
        """Share of its parameters that the old policy keeps after training step `step`."""

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """One advantage per image, normalized within the prompt."""
        return credit.per_image(tree, rewards, how)

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        if self.updates_per_rollout == "per_step":
            raise ValueError(
                f"updates_per_rollout=per_step: method {self.name!r} trains no steps. Use a number."
            )
