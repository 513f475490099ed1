"""Objectives: one loss for every trained edge, unreduced. The only reduction anywhere is sum / global count.

Shapes: E trained edges of a micro-batch, *L latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowgrain.sde import Gaussian, Step

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

    law: p_theta of the step; old_log_prob, advantage [E]; following [E, *L] the latent that was drawn; reference the law of
    the frozen model, if there is one; step where on the grid.
    """

    law: Gaussian
    following: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    step: Step
    reference: Gaussian | None = None


Objective = Callable[[Edges], EdgeLoss]


def clipped(clip_range: float, kl_weight: float = 0.0, kl_form: KLForm = "gaussian") -> Objective:
    """PPO's clipped surrogate (Flow-GRPO eq. 5, G2RPO eq. 13) and, where weighted, the KL to the reference.

    kl_form "gaussian" is the exact KL of two Gaussians; "flow_grpo" is the published code's, which divides by 2 s^2
    instead of 2 std^2 = 2 s^2 (-dt).
    """

    def objective(edges: Edges) -> EdgeLoss:
        ratio = (edges.law.log_prob(edges.following) - edges.old_log_prob).exp()
        held = ratio.clamp(1 - clip_range, 1 + clip_range)
        free, bound = ratio * edges.advantage, held * edges.advantage
        loss = -torch.minimum(free, bound)
        kl = torch.zeros_like(loss)
        if edges.reference is not None:
            kl = edges.law.kl(edges.reference)
            if kl_form == "flow_grpo":
                kl = kl * -edges.step.dt
            loss = loss + kl_weight * kl
        return EdgeLoss(loss, ratio, bound < free, kl)

    return objective
