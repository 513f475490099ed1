"""Base class of methods that train stochastic steps."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PrivateAttr, Strict
from torch import Tensor

from flowgrain.core import credit, objective
from flowgrain.core.credit import ComparisonGroup, Normalization
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
from flowgrain.methods.base import Method
from flowgrain.methods.cost import plan_tree
from flowgrain.methods.plans import completed_trajectory
from flowgrain.settings import Section, Setting

SdeType = Literal["flow_sde", "dance_sde", "cps", "calibrated_sde"]
FloatTuple = Annotated[tuple[Annotated[float, Field(gt=0, le=100)], ...], Strict(False)]


class Calibration(Section):
    """Calibration of the noise strengths psi of `calibrated_sde` (DenseGRPO section 4.2)."""

    rounds: int = Setting(
        20,
        "Number of rounds. Each round changes every psi by `step`.",
        unit="rounds",
        ge=1,
        le=10_000,
    )
    samples: int = Setting(
        64,
        "Trajectories per round, each with its own prompt (N).",
        unit="samples",
        ge=2,
        le=1_000_000,
    )
    step: float = Setting(0.01, "Change of psi per round.", gt=0, le=1)
    balance: float = Setting(
        0.25, "A step is balanced if |gains - losses| / N is below this value.", gt=0, le=1
    )


class PolicyGradient(Method):
    """A method that trains stochastic steps by the ratio of their transition probabilities."""

    sde_type: SdeType = Setting("flow_sde", "Transition kernel of the stochastic steps.", keep=True)
    eta: float = Setting(0.7, "Noise strength of the stochastic steps.", gt=0, le=100)
    cps_log_prob: Literal["gaussian", "squared_error"] = Setting(
        "gaussian",
        "Log-probability of cps: of the Gaussian, or the negative squared error of the published "
        "code, to which published clip ranges belong.",
    )
    psi: FloatTuple | None = Setting(
        None,
        "Noise strength of every grid step for calibrated_sde. "
        "Default: calibrated before the first training step.",
        keep=True,
    )
    calibration: Calibration = Setting(Calibration(), "Calibration of psi for calibrated_sde.")
    clip_range: float = Setting(1e-4, "PPO clip range of the ratio.", gt=0, le=1000)
    kl_form: KLForm = Setting(
        "gaussian",
        "Exact Gaussian KL (gaussian), or the form of Flow-GRPO's published code (published).",
    )
    comparison: ComparisonGroup = Setting(
        "step",
        "Comparison group: edges of a prompt at the same grid step (step), all edges of a prompt "
        "(prompt, Stepwise-Flow-GRPO), or edges that start from the same state (parent).",
    )
    best_of: int = Setting(
        0,
        "Samples per comparison group to train on: half of them the best, half the worst. 0: all.",
        unit="samples",
        ge=0,
        le=10_000,
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
        if self.sde_type == "cps":
            return CPS(self.eta, self.cps_log_prob == "squared_error")
        return FlowSDE(self.eta)

    def objective(self, sigmas: Tensor) -> Objective:
        """The loss of a trained edge.

        Default: PPO's clipped surrogate and the KL to the reference.
        """
        return objective.clipped(self.clip_range, self.kl_weight, self.kl_form_of_kernel)

    @property
    def kl_form_of_kernel(self) -> KLForm:
        """`kl_form`. With CPS, both forms are the same: the published code divides by std^2."""
        return "gaussian" if self.sde_type == "cps" else self.kl_form

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
        if self.comparison == "parent":
            tree = plan_tree(self, num_steps)
            if len(tree.trained_parents) == len(tree.edges):
                raise ValueError(
                    "comparison=parent: no state of this method has several trained steps, so "
                    "there is nothing to compare. Use method.comparison=step."
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
        own_form = self.cps_log_prob != type(self).model_fields["cps_log_prob"].default
        if self.sde_type != "cps" and own_form:
            raise ValueError(
                f"cps_log_prob={self.cps_log_prob}: has no effect with "
                f"method.sde_type={self.sde_type}. Remove it, or use method.sde_type=cps."
            )
        if self.sde_type == "cps":
            self.check_unused(("kl_form",), "method.sde_type=cps")  # both forms are the same
        if self.sde_type == "cps" and self.eta > 1:
            raise ValueError(
                f"eta={self.eta}: method.sde_type=cps rotates by eta * 90 degrees. Use at most 1."
            )
