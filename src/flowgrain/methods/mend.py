"""MEND (arXiv 2610.05954)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import PrivateAttr, Strict
from torch import Tensor

from flowgrain.core import mend
from flowgrain.core.credit import RewardMix
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.flow_grpo import FLOW_GRPO_RUN
from flowgrain.methods.forward_process import Range
from flowgrain.methods.repair import Repair
from flowgrain.settings import Setting

Lengths = Annotated[tuple[float, ...], Strict(False)]


@register
class MEND(Repair):
    """MEND: images below a cap are moved along the gradient of their reward.

    A move is accepted if it raises the capped reward by more than its proximal cost. The trained
    policy regresses on the x0 estimate of the slowly moving policy plus the accepted move.
    """

    name = "mend"
    title = "MEND"
    paper = "2610.05954"
    summary = (
        "Images with a reward below a cap are moved along the gradient of their reward. The policy "
        "is trained at one state of every trajectory."
    )
    config_defaults = FLOW_GRPO_RUN  # published code
    learning_rates = LearningRates(lora=3e-4)  # published code
    # max_decay, decay_rate, decay_start: decay type 1 of the published code

    group_size: int = 24  # published code
    reward_mix: RewardMix = "reward"  # published code: a sum of rewards
    tail_order: Literal[1, 2] = 2  # published code
    etas: Lengths = Setting(
        (0.1, 0.2, 0.4),
        "Lengths of the candidates: root mean square of their distance to the image.",
    )  # published code: flags of the paper's runs
    cap_quantile: float = Setting(
        0.75, "Quantile of the rewards of a prompt that caps its rewards.", ge=0, le=1
    )  # published code: flags of the paper's runs
    global_quantile: float = Setting(
        0.5, "Quantile of all rewards of a rollout that the global cap follows.", ge=0, le=1
    )  # published code
    global_rate: float = Setting(
        0.1, "Share of the distance to this quantile that the global cap rises.", ge=0, le=1
    )  # published code
    keep_weight: float = Setting(
        10.0, "Weight of the images without a repair (lambda_keep).", ge=0, le=1e6
    )  # published code: flags of the paper's runs
    error: mend.ErrorScale = Setting(
        "mse",
        "Squared error of the x0 estimate (mse), or divided by its mean absolute error (adaptive).",
    )  # golden cases: both exist
    tau: float = Setting(
        0.1, "Step size of the first rollout (tau). The cost of a move is d^2 / (2 tau).", gt=0
    )  # published code
    tau_range: Range = Setting((1e-3, 10.0), "Smallest and largest tau.")  # published code
    acceptance_range: Range = Setting(
        (0.3, 0.6),
        "With a smaller share of accepted images, tau is multiplied by tau_factor. With a larger "
        "share, it is divided by it.",
    )  # published code
    tau_factor: float = Setting(
        1.5, "Factor of tau between two rollouts.", ge=1, le=1000
    )  # published code
    _tau: float | None = PrivateAttr(None)  # of the next rollout. None: the first
    _global_cap: float | None = PrivateAttr(None)  # after the last rollout. None: the first

    @property
    def num_candidates(self) -> int:
        return len(self.etas)

    def caps(self, reward: Tensor, group: Tensor) -> Tensor:
        cap = mend.group_cap(reward, group, self.cap_quantile)
        return cap.clamp(min=self._next_global_cap(reward))

    def moves(self, slope: Tensor) -> Tensor:
        return mend.proposals(slope, self.etas)

    def choose(self, reward: Tensor, candidates: Tensor, cap: Tensor, moves: Tensor) -> Tensor:
        cost = mend.proximal_cost(moves, self._current_tau())
        return mend.verdict(mend.capped_objective(reward, candidates, cap, cost))

    def weights(self, repaired: Tensor, kept: Tensor) -> Tensor:
        return mend.loss_weights(repaired, kept, self.keep_weight)

    def loss_of_move(self, v: Tensor, old: Tensor, sigma: Tensor, move: Tensor) -> Tensor:
        return mend.x0_loss(v, old, sigma, move, self.error)

    def end_rollout(self, reward: Tensor, repaired: int, failing: int) -> None:
        if not reward.isnan().all():
            self._global_cap = self._next_global_cap(reward)
        if failing:
            self._tau = mend.next_tau(
                self._current_tau(),
                repaired / failing,
                self.acceptance_range,
                self.tau_factor,
                self.tau_range,
            )

    def round_metrics(self, reward: Tensor) -> dict[str, float]:
        return {
            "repair/tau": self._current_tau(),
            "repair/global_cap": self._next_global_cap(reward),
        }

    def _current_tau(self) -> float:
        return self.tau if self._tau is None else self._tau

    def _next_global_cap(self, reward: Tensor) -> float:
        quantile, rate = self.global_quantile, self.global_rate
        return mend.next_global_cap(self._global_cap, reward, quantile, rate)

    def state_dict(self) -> dict[str, Any]:
        """tau and kappa_glob of the next rollout. None before the first."""
        return {"tau": self._tau, "global_cap": self._global_cap}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._tau, self._global_cap = state["tau"], state["global_cap"]

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if not self.etas or min(self.etas) <= 0:
            raise ValueError(f"etas={list(self.etas)}: use one or more positive numbers.")
        for name in ("tau_range", "acceptance_range"):
            low, high = getattr(self, name)
            if not 0 <= low < high:
                raise ValueError(f"{name}={[low, high]}: use two rising numbers.")
        if self.acceptance_range[1] > 1:
            raise ValueError(
                f"acceptance_range={list(self.acceptance_range)}: these are shares of the images. "
                "Use two rising numbers between 0 and 1."
            )
        low, high = self.tau_range
        if not low <= self.tau <= high or low <= 0:
            raise ValueError(
                f"tau={self.tau:g}: use a value within method.tau_range={[low, high]}, which must "
                "be positive."
            )
