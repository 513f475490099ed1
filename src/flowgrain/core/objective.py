"""Objectives: one loss for every trained edge, unreduced. The only reduction anywhere is sum / global count.

Shapes: E trained edges of a micro-batch, *L latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowgrain.core.sde import Gaussian, Step, per_row

KLForm = Literal["gaussian", "flow_grpo"]


@dataclass(frozen=True)
class EdgeLoss:
    """What an objective says of E edges: loss, ratio, whether the clip is what counted, and the KL to the reference. [E] each."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Edges:
    """E trained edges as the objective sees them.

    law: p_theta of the step, old that of the policy before the rollout's first update; following [E, *L] the latent that was
    drawn; advantage [E]; step where on the grid; reference the law of the frozen model, if there is one.
    """

    law: Gaussian
    old: Gaussian
    following: Tensor
    advantage: Tensor
    step: Step
    reference: Gaussian | None = None


Objective = Callable[[Edges], EdgeLoss]


def _surrogate(ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) of every edge, and whether the clip is what counted. [E] each."""
    free, bound = ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    return -torch.minimum(free, bound), bound < free


def _kl(edges: Edges, form: KLForm) -> Tensor:
    """KL [E] to the reference, 0 without one. "flow_grpo" is the published code's, over 2 s^2 and not 2 std^2 = 2 s^2 (-dt)."""
    if edges.reference is None:
        return torch.zeros_like(edges.advantage)
    kl = edges.law.kl(edges.reference)
    return kl * -edges.step.dt if form == "flow_grpo" else kl


def clipped(clip_range: float, kl_weight: float = 0.0, kl_form: KLForm = "gaussian") -> Objective:
    """PPO's clipped surrogate (Flow-GRPO eq. 5, G2RPO eq. 13) and, where weighted, the KL to the reference."""

    def objective(edges: Edges) -> EdgeLoss:
        ratio = (edges.law.log_prob(edges.following) - edges.old.log_prob(edges.following)).exp()
        loss, held = _surrogate(ratio, edges.advantage, clip_range)
        kl = _kl(edges, kl_form)
        return EdgeLoss(loss + kl_weight * kl, ratio, held, kl)

    return objective


def guarded(clip_range: float, kl_weight: float = 0.0, kl_form: KLForm = "gaussian") -> Objective:
    """GRPO-Guard: log r' = std (log r + ||mean - mean_old||^2 / (2 std^2)), the surrogate divided by -dt.

    The ratio so normalised has mean 1 and the same spread at every step, and every step the same share of the gradient.
    """

    def objective(edges: Edges) -> EdgeLoss:
        log_ratio = edges.law.log_prob(edges.following) - edges.old.log_prob(edges.following)
        ratio = (edges.law.std * (log_ratio + edges.law.kl(edges.old))).exp()
        loss, held = _surrogate(ratio, edges.advantage, clip_range)
        kl = _kl(edges, kl_form)
        return EdgeLoss(loss / -edges.step.dt + kl_weight * kl, ratio, held, kl)

    return objective


def weighted(inner: Objective, weights: Sequence[float]) -> Objective:
    """`inner` with the loss of an edge at grid step i times weights[i] (TempFlow-GRPO)."""

    def objective(edges: Edges) -> EdgeLoss:
        found = inner(edges)
        of_edge = torch.tensor(weights, device=found.loss.device)[edges.step.index]
        return replace(found, loss=found.loss * of_edge)

    return objective


@dataclass(frozen=True)
class ForwardProcess:
    """DiffusionNFT's loss on noised samples, which needs no step of the sampler (arXiv 2509.16117 eq. 5 and public code).

    beta: how far v_plus and v_minus stand from the old velocity; advantage_clip: the advantage that makes r = 1;
    times: noise levels drawn for every image; max_decay, decay_rate: the old policy keeps min(decay_rate step, max_decay) of
    itself after training step `step`.
    """

    beta: float
    advantage_clip: float
    times: int
    max_decay: float
    decay_rate: float

    def decay(self, step: int) -> float:
        """The share of itself that the old policy keeps after training step `step`."""
        return min(self.decay_rate * step, self.max_decay)

    def loss(self, v: Tensor, v_old: Tensor, target: Tensor, sigma: Tensor, advantage: Tensor) -> Tensor:
        """Loss [B] of velocities v, v_old against the target u = eps - x0, each [B, *L], at sigma [B].

        The squares are those of the x0 estimates, sigma^2 ||v - u||^2, each divided by its own mean absolute error.
        """
        r = (advantage / self.advantage_clip / 2 + 0.5).clamp(0, 1)

        def square(velocity: Tensor) -> Tensor:
            error = (per_row(sigma, v) * (velocity - target)).flatten(1)
            scale = error.detach().abs().mean(1).clamp(min=1e-5)
            return error.square().mean(1) / scale

        plus, minus = (v_old + sign * self.beta * (v - v_old) for sign in (1, -1))
        return self.advantage_clip / self.beta * (r * square(plus) + (1 - r) * square(minus))
