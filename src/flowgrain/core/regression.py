"""Losses of methods that train on finished images by adding noise to them again.

An image x0 is noised to x_t = (1 - t) x0 + t eps. The model predicts v, and u = eps - x0 is the
target. A draw is a pair (t, eps) of an image. All methods are regressions of v with another target
and weight. Losses are unreduced. The only reduction is in the update: sum / global count.

Shapes: B draws, I images, N draws of an image, *L latent.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from flowgrain.core.objective import surrogate
from flowgrain.core.sde import per_row

AwmWeighting = Literal["uniform", "t", "t_squared", "huber", "generalized_huber"]
Matching = Literal["mse", "bce"]
_TINY = 1e-10


@dataclass(frozen=True)
class Noised:
    """B noised images and what the policies predict for them.

    Attributes:
        v: [B, *L] velocity of the trained policy.
        target: [B, *L] u = eps - x0.
        sigma: [B] noise levels t.
        advantage: [B].
        old: [B, *L] velocity of the slowly moving policy, or None.
        reference: [B, *L] velocity of the frozen reference, or None.
        old_quantity: [B] the method's quantity under the old policy. None: the trained policy is
            still the old policy.
    """

    v: Tensor
    target: Tensor
    sigma: Tensor
    advantage: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    old_quantity: Tensor | None = None


@dataclass(frozen=True)
class Quantities:
    """One number per draw: N draws of each of I images.

    Attributes:
        trained: [I, N] of the trained policy. A loss of it has a gradient.
        old: [I, N] of the old policy.
        reference: [I, N] of the frozen reference, or None.
        advantage: [I].
        group: [I] number of the comparison group, from 0.
        known: [I] whether the image has a score. Others have no loss and are in no mean. None: all
            images have one.
    """

    trained: Tensor
    old: Tensor
    reference: Tensor | None
    advantage: Tensor
    group: Tensor
    known: Tensor | None = None

    def mean_of_group(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean [I, N] of `values` [I, N] over the images of a group, for every draw.

        Args:
            values: [I, N].
            weight: [I] weights of the images, with sum 1 in every group. Default: equal weights of
                the images with a score.
        """
        groups = int(self.group.max()) + 1
        if weight is None:
            known = torch.ones_like(self.group) if self.known is None else self.known.long()
            count = torch.zeros(groups, dtype=known.dtype, device=known.device)
            count = count.index_add(0, self.group, known)
            weight = known / count.clamp(min=1)[self.group]
        total = values.new_zeros(groups, values.shape[1])
        weighted = values * weight.to(values)[:, None]
        return total.index_add(0, self.group, weighted)[self.group]


def squared_error(v: Tensor, target: Tensor) -> Tensor:
    """||v - target||^2 [B], the mean over dimensions."""
    return (v - target).square().flatten(1).mean(1)


def normalized(error: Tensor) -> Tensor:
    """||error||^2 / mean|error| [B]. The denominator has no gradient and is at least 1e-5."""
    error = error.flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


def x0_error(v: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """Error [B, *L] of the estimate x0 = x_t - t v, up to its sign: t (v - u)."""
    return per_row(sigma, v) * (v - target)


def nft_loss(x: Noised, beta: float, advantage_clip: float) -> Tensor:
    """DiffusionNFT's loss [B] (arXiv 2509.16117 eq. 5 and published code).

    The loss uses the normalized squared error of the x0 estimate.

    Args:
        x: noised images, with the velocity of the old policy.
        beta: scale of v+ and v-, which are v_old + beta (v - v_old) and v_old - beta (v - v_old).
        advantage_clip: advantage at which the optimality probability r is 1.
    """
    assert x.old is not None
    r = (x.advantage / advantage_clip / 2 + 0.5).clamp(0, 1)
    plus, minus = (
        normalized(x0_error(x.old + sign * beta * (x.v - x.old), x.target, x.sigma))
        for sign in (1, -1)
    )
    return advantage_clip / beta * (r * plus + (1 - r) * minus)


def awm_weighted(error: Tensor, sigma: Tensor, weighting: AwmWeighting, power: float) -> Tensor:
    """AWM's weighted error w(l) [B] (arXiv 2509.25050 and published code).

    Args:
        error: l [B], squared error of the velocity.
        sigma: [B] noise levels t.
        weighting: l, t l, t^2 l, or with p = `power` t ((l + 1e-10)^p - 1e-10^p) / p ("huber": p =
            1/2 without the factor 1 / p).
        power: p of "generalized_huber".
    """
    if weighting == "uniform":
        return error
    if weighting == "t":
        return sigma * error
    if weighting == "t_squared":
        return sigma.square() * error
    if weighting == "huber":
        root: Tensor = (error + _TINY).sqrt() - _TINY**0.5
        return sigma * root
    lifted: Tensor = (error + _TINY).pow(power) - _TINY**power
    return sigma / power * lifted


def likelihood_ratio(quantity: Tensor, old: Tensor | None) -> Tensor:
    """exp(q_old - q) of a weighted error q. It is 1, with a gradient, if `old` is None."""
    return ((quantity.detach() if old is None else old) - quantity).exp()


def clipped_ratio_loss(
    quantity: Tensor, old: Tensor | None, advantage: Tensor, clip_range: float
) -> Tensor:
    """PPO's clipped surrogate of `likelihood_ratio` (AWM)."""
    return surrogate(likelihood_ratio(quantity, old), advantage, clip_range)[0]


def ram_loss(x: Noised, eta: float) -> Tensor:
    """RAM's loss [B]: ||v - sg[v_ref + eta A (u - v_old)]||^2 (arXiv 2605.10759 eq. 17).

    Without an old policy, v_old is v.
    """
    assert x.reference is not None
    residual = x.target - (x.v if x.old is None else x.old)
    moved = x.reference + eta * per_row(x.advantage, x.v) * residual
    return squared_error(x.v, moved.detach())


def flow_awr_energy(advantage: Tensor, group: Tensor, gating: Literal["soft", "hard"]) -> Tensor:
    """FlowAWR's energy e [I]: the softmax of the advantages within the group, minus 1 / G.

    Args:
        advantage: [I].
        group: [I] number of the group.
        gating: "soft" multiplies by G, "hard" divides by the std of the group plus 1e-4, at least
            0.01 (GenEval and OCR).
    """
    groups = int(group.max()) + 1 if len(group) else 0
    size = torch.bincount(group, minlength=groups)[group].to(advantage)
    energy = group_softmax(advantage, group) - 1 / size
    if gating == "soft":
        return energy * size
    square = advantage.new_zeros(groups).index_add(0, group, energy.square())[group]
    # The mean of the energies of a group is 0.
    std = (square / size).sqrt()
    return energy / (std + 1e-4).clamp(min=0.01)


def flow_awr_loss(x: Noised, energy: Tensor) -> Tensor:
    """FlowAWR's loss [B] (arXiv 2606.30376 and published code).

    The target is x0_old + e (x0 - x0_old), where x0_old is the estimate of the old policy. The
    squared error is divided by the mean absolute error of the estimate against the image.

    Args:
        x: noised images, with the velocity of the old policy.
        energy: e [B].
    """
    assert x.old is not None
    scale = x0_error(x.v, x.target, x.sigma).detach().flatten(1).abs().mean(1).clamp(min=1e-5)
    difference = (x.v - x.old) + per_row(energy, x.v) * (x.old - x.target)
    return (per_row(x.sigma, x.v) * difference).square().flatten(1).mean(1) / scale


def dgpo_loss(q: Quantities, beta: float, clip_range: float | None) -> Tensor:
    """DGPO's loss [I, N] (arXiv 2510.08425 and published code).

    sg sigmoid(mean_j A_j beta (l_j - l_ref,j)) A_i l_i, where j are the images of the group under
    the same draw.

    Args:
        q: squared errors l.
        beta: scale of the preference.
        clip_range: an image has no gradient once exp(l_old - l) has left 1 +- clip_range in the
            direction of its advantage. None: no clip.
    """
    assert q.reference is not None
    advantage, error = q.advantage[:, None], q.trained
    preference = q.mean_of_group(advantage * beta * (error - q.reference).detach())
    if clip_range is not None:
        outside = left_trust_region(error, q.old, advantage, clip_range)
        error = torch.where(outside, error.detach(), error)
    return preference.sigmoid() * advantage * error


def left_trust_region(
    quantity: Tensor, old: Tensor, advantage: Tensor, clip_range: float
) -> Tensor:
    """Whether exp(q_old - q) has left 1 +- clip_range in the direction of the advantage."""
    ratio = (old - quantity.detach()).exp()
    above, below = ratio > 1 + clip_range, ratio < 1 - clip_range
    return torch.where(advantage > 0, above, below)


def dpo_loss(q: Quantities, beta: float) -> Tensor:
    """Diffusion-DPO's loss [I, N] of pairs (arXiv 2311.12908 and the published flow code).

    -log sigmoid(-beta / 2 [(l_w - l_ref,w) - (l_l - l_ref,l)]), where w is the image of the pair
    with the higher advantage. Both images have this loss, so that their mean is the loss of the
    pair. A pair with equal advantages has loss 0.

    Args:
        q: squared errors l. Every group is a pair.
        beta: scale of the preference.
    """
    assert q.reference is not None
    advantage = q.advantage[:, None].expand_as(q.trained)
    sign = (advantage - q.mean_of_group(advantage)).sign()
    difference = 2 * q.mean_of_group(sign * (q.trained - q.reference))
    return softplus(beta / 2 * difference) * sign.abs()


def crd_loss(
    q: Quantities, reward: Tensor, beta: float, temperature: float | None, kind: Matching
) -> Tensor:
    """CRD's loss [I, N]: centered implicit rewards against centered rewards (arXiv 2603.14128).

    The implicit reward of a draw is r = l_old - l. Rewards and implicit rewards are centered by
    their mean over the group, which has no gradient.

    Args:
        q: errors l.
        reward: [I] in 0..1.
        beta: scale of the implicit reward.
        temperature: the mean is weighted by softmax(+-reward / temperature), and both directions
            are averaged. None: the plain mean.
        kind: "mse", or "bce" for a cross entropy with sigmoid(reward - mean).
    """
    implicit = q.old - q.trained
    if temperature is None:
        return _centered(q, implicit, reward, None, beta, kind)
    directions = (group_softmax(sign * reward / temperature, q.group, q.known) for sign in (1, -1))
    return sum(0.5 * _centered(q, implicit, reward, w, beta, kind) for w in directions)  # type: ignore[return-value]


def _centered(
    q: Quantities,
    implicit: Tensor,
    reward: Tensor,
    weight: Tensor | None,
    beta: float,
    kind: Matching,
) -> Tensor:
    rewards = reward[:, None].expand_as(implicit)
    wanted = rewards - q.mean_of_group(rewards, weight)
    own = beta * (implicit - q.mean_of_group(implicit.detach(), weight))
    if kind == "mse":
        return (own - wanted).square()
    return binary_cross_entropy_with_logits(own, wanted.sigmoid(), reduction="none")


def group_softmax(values: Tensor, group: Tensor, known: Tensor | None = None) -> Tensor:
    """Softmax [I] of `values` [I] within every group, of the images in `known`. Others have 0."""
    groups = int(group.max()) + 1 if len(group) else 0
    if known is not None:
        values = values.where(known, torch.finfo(values.dtype).min)
    largest = values.new_full((groups,), -torch.inf).scatter_reduce(0, group, values, "amax")
    weight = (values - largest[group]).exp()
    if known is not None:
        weight = weight * known
    # The sum of a group is at least 1, or 0 if it contains no image in `known`.
    return weight / values.new_zeros(groups).index_add(0, group, weight).clamp(min=1)[group]


GroupLoss = Callable[[Quantities], Tensor]
"""Losses [I, N] of the draws of whole groups."""


def linearized(loss: GroupLoss, q: Quantities) -> tuple[Tensor, Tensor]:
    """The losses [I, N] of whole groups, and d(sum of losses) / d(q.trained) [I, N].

    The gradient of the losses in the parameters is the sum of these derivatives times the gradients
    of the quantities. It can therefore be computed draw by draw, in any number of micro-batches.
    """
    with torch.enable_grad():
        trained = q.trained.detach().requires_grad_()
        values = loss(replace(q, trained=trained))
        if q.known is not None:
            values = torch.where(q.known[:, None], values, 0)
        (derivative,) = torch.autograd.grad(values.sum(), trained)
    return values.detach(), derivative
