"""Objectives: one loss per trained edge, unreduced.

The only reduction is in the update: sum / global count.

Shapes: E trained edges of a micro-batch, B rows, *L latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowgrain.core.sde import Gaussian, Step

KLForm = Literal["gaussian", "published"]
"""Exact Gaussian KL, or the form of Flow-GRPO's published code, which divides by s^2."""


@dataclass(frozen=True)
class EdgeLoss:
    """Result of an objective.

    Attributes:
        loss: [E].
        ratio: [E] p_theta / p_old.
        clipped: [E] whether the clip is active.
        kl: [E] KL to the reference.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Edges:
    """E trained edges, the input of an objective.

    Attributes:
        transition: p_theta(x_next | x) of the trained policy.
        old_transition: transition of the policy that generated the rollout.
        x_next: [E, *L] sampled latents.
        advantage: [E].
        step: grid steps.
        reference: transition of the frozen reference model, or None.
    """

    transition: Gaussian
    old_transition: Gaussian
    x_next: Tensor
    advantage: Tensor
    step: Step
    reference: Gaussian | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log p_theta(x_next | x) - log p_old(x_next | x), [E]."""
        new = self.transition.log_prob(self.x_next)
        return new - self.old_transition.log_prob(self.x_next)


Objective = Callable[[Edges], EdgeLoss]


def surrogate(ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) [E], and whether the clipped term is the smaller term [E] (PPO)."""
    free, bound = ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    return -torch.minimum(free, bound), bound < free


def _kl(edges: Edges, form: KLForm) -> Tensor:
    """KL [E] to the reference. 0 without a reference.

    "published" (Flow-GRPO's code) divides by 2 s^2 instead of 2 std^2 = 2 s^2 (-dt).
    """
    if edges.reference is None:
        return torch.zeros_like(edges.advantage)
    kl = edges.transition.kl(edges.reference)
    return kl * -edges.step.dt if form == "published" else kl


def clipped(
    clip_range: float,
    kl_weight: float = 0.0,
    kl_form: KLForm = "gaussian",
    step_weights: Sequence[float] | None = None,
) -> Objective:
    """PPO's clipped surrogate plus `kl_weight` times the KL to the reference.

    Flow-GRPO eq. 5, G2RPO eq. 13.

    Args:
        clip_range: clip range of the ratio.
        kl_weight: weight of the KL.
        kl_form: see `KLForm`.
        step_weights: factor of the surrogate, not of the KL, at every grid step (TempFlow-GRPO).
    """

    def objective(edges: Edges) -> EdgeLoss:
        ratio = edges.log_ratio.exp()
        loss, active = surrogate(ratio, edges.advantage, clip_range)
        if step_weights is not None:
            loss = loss * torch.tensor(step_weights, device=loss.device)[edges.step.index]
        kl = _kl(edges, kl_form)
        return EdgeLoss(loss + kl_weight * kl, ratio, active, kl)

    return objective


def guarded(clip_range: float, kl_weight: float = 0.0, kl_form: KLForm = "gaussian") -> Objective:
    """GRPO-Guard: the clipped surrogate of a normalized ratio, divided by -dt.

    log r' = std (log r + ||mean - mean_old||^2 / (2 std^2)). The normalized ratio r' has mean 1 and
    the same spread at every step. Every step contributes the same share of the gradient.
    """

    def objective(edges: Edges) -> EdgeLoss:
        log_ratio = edges.log_ratio
        drift = edges.transition.kl(edges.old_transition)
        ratio = (edges.transition.std * (log_ratio + drift)).exp()
        loss, active = surrogate(ratio, edges.advantage, clip_range)
        kl = _kl(edges, kl_form)
        return EdgeLoss(loss / -edges.step.dt + kl_weight * kl, ratio, active, kl)

    return objective


def divergence_masked(
    trust_region: float, kl_weight: float = 0.0, kl_form: KLForm = "gaussian"
) -> Objective:
    """Flow-DPPO: the surrogate r A without a clip, of the edges inside the trust region.

    An edge is dropped, so that its loss and gradient are 0, if two conditions hold (arXiv
    2606.11025 eq. 14 and 18, mean over latent dimensions as in the published code):

    - ||mean - mean_old||^2 / (2 std^2) >= `trust_region`,
    - the ratio has moved in the direction of the advantage: r > 1 and A > 0, or r < 1 and A < 0.

    Dropped edges count in the mean of the losses. `EdgeLoss.clipped` marks them.

    Args:
        trust_region: largest divergence from the old policy at which all edges are kept.
        kl_weight: weight of the KL to the reference, which no edge drops.
        kl_form: see `KLForm`.
    """

    def objective(edges: Edges) -> EdgeLoss:
        ratio = edges.log_ratio.exp()
        with torch.no_grad():
            far = edges.transition.kl(edges.old_transition) >= trust_region
            dropped = far & ((ratio - 1) * edges.advantage > 0)
        unclipped = -ratio * edges.advantage
        loss = torch.where(dropped, torch.zeros_like(unclipped), unclipped)
        kl = _kl(edges, kl_form)
        return EdgeLoss(loss + kl_weight * kl, ratio, dropped, kl)

    return objective


def score_function(kl_weight: float = 0.0, kl_form: KLForm = "gaussian") -> Objective:
    """DDPO's score-function estimator (arXiv 2305.13301, DDPO_SF).

    The gradient is -A grad log p(x_next | x) of the trained policy. The value is -A, because the
    log-probability is subtracted from itself without a gradient. The estimator is on-policy: it
    does not use the old policy, and is correct for the first update of a rollout only.

    Args:
        kl_weight: weight of the KL to the reference.
        kl_form: see `KLForm`.
    """

    def objective(edges: Edges) -> EdgeLoss:
        log_prob = edges.transition.log_prob(edges.x_next)
        ratio = (log_prob - log_prob.detach()).exp()
        kl = _kl(edges, kl_form)
        never = torch.zeros_like(ratio, dtype=torch.bool)
        return EdgeLoss(-ratio * edges.advantage + kl_weight * kl, ratio.detach(), never, kl)

    return objective
