"""Repairs of images along the gradient of their reward (MEND, arXiv 2610.05954).

An image x0 with a reward below a cap gets candidates x0 + d along the gradient g of its reward. The
best candidate is accepted if it is strictly better than x0. The regression moves the x0 estimate of
the trained policy by the accepted d, and keeps the estimate of an image without a repair.

Shapes: I images, K candidates of an image, B rows, *L latent.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flowgrain.core.regression import normalized
from flowgrain.core.sde import per_row

ErrorScale = Literal["mse", "adaptive"]

KEPT = -1
"""Index of an image without an accepted candidate."""


def nearest_level(sigmas: Sequence[float], sigma: float) -> int:
    """Grid index of the level above 0 that is nearest to `sigma`. Of equal distances the first."""
    return min(range(len(sigmas) - 1), key=lambda index: abs(sigmas[index] - sigma))


def group_cap(reward: Tensor, group: Tensor, quantile: float) -> Tensor:
    """The quantile [I] of the rewards of the group of every image. NaN rewards are left out.

    Args:
        reward: [I].
        group: [I] number of the group, from 0.
        quantile: share in 0..1, with linear interpolation.
    """
    groups = int(group.max()) + 1 if len(group) else 0
    caps = [torch.nanquantile(reward[group == number], quantile) for number in range(groups)]
    return torch.stack(caps)[group] if caps else reward.clone()


def next_global_cap(previous: float | None, reward: Tensor, quantile: float, rate: float) -> float:
    """kappa_glob of a rollout: max(k, k + rate (q - k)), where k is the previous value.

    It never falls. The first value is q, the quantile of the rewards of all images.

    Args:
        previous: kappa_glob of the previous rollout, or None.
        reward: [I] rewards. NaN rewards are left out. If all are NaN, `previous` or NaN is
            returned.
        quantile: share in 0..1.
        rate: share of the distance to the quantile.
    """
    target = float(torch.nanquantile(reward, quantile))
    if previous is None:
        return target
    return previous if math.isnan(target) else max(previous, previous + rate * (target - previous))


def unit_direction(slope: Tensor) -> Tensor:
    """g / rms(g) [B, *L] of the gradients g [B, *L]. The mean square over dimensions is 1."""
    rms = slope.flatten(1).square().mean(1).sqrt()
    return slope / per_row(rms + 1e-12, slope)


def proposals(slope: Tensor, etas: Sequence[float]) -> Tensor:
    """Displacements d [K, B, *L] of the candidates x0 + d: eta g / rms(g) for every eta.

    Args:
        slope: [B, *L] gradients g of the reward with respect to x0.
        etas: K lengths.
    """
    direction = unit_direction(slope)
    return torch.stack([eta * direction for eta in etas])


def proximal_cost(displacement: Tensor, tau: float) -> Tensor:
    """mean(d^2) / (2 tau) [K, B] of displacements d [K, B, *L]."""
    return displacement.flatten(2).square().mean(2) / (2 * tau)


def capped_objective(reward: Tensor, candidates: Tensor, cap: Tensor, cost: Tensor) -> Tensor:
    """J [1 + K, I]: min(R, kappa) - mean(d^2) / (2 tau). The first row is the unmoved image.

    Args:
        reward: [I] rewards R of the images.
        candidates: [K, I] rewards of the candidates.
        cap: [I] kappa.
        cost: [K, I], see `proximal_cost`.
    """
    return torch.cat([reward.minimum(cap)[None], candidates.minimum(cap) - cost])


def verdict(objective: Tensor) -> Tensor:
    """Number [I] of the accepted candidate, from 0, or `KEPT`.

    The best candidate is accepted if its J is strictly larger than the J of the unmoved image. A
    candidate whose J is NaN is never accepted.

    Args:
        objective: J [1 + K, I].
    """
    best, index = objective[1:].nan_to_num(-torch.inf, torch.inf, -torch.inf).max(0)
    return torch.where(best > objective[0], index, KEPT)


def loss_weights(repaired: Tensor, kept: Tensor, keep_weight: float) -> Tensor:
    """Weights [I]: 1 / n_repaired of repaired images, lambda_keep / n_kept of kept images.

    Args:
        repaired: [I] whether a candidate was accepted.
        kept: [I] whether the image has a reward and no accepted candidate. Other images have the
            weight 0.
        keep_weight: lambda_keep.
    """
    of_repaired = repaired.double() / repaired.sum().clamp(min=1)
    return of_repaired + keep_weight * kept.double() / kept.sum().clamp(min=1)


def x0_target(z: Tensor, v_old: Tensor, sigma: Tensor, move: Tensor) -> Tensor:
    """z - t v_old + d [B, *L]: the x0 estimate of the old policy at state z, moved by d."""
    return z - per_row(sigma, z) * v_old + move


def x0_loss(v: Tensor, v_old: Tensor, sigma: Tensor, move: Tensor, scale: ErrorScale) -> Tensor:
    """Loss [B] of the x0 estimate z - t v against `x0_target`, in which z cancels.

    Args:
        v: [B, *L] velocity of the trained policy at a state z.
        v_old: [B, *L] velocity of the old policy at z.
        sigma: [B] noise level t of z.
        move: [B, *L] accepted d, or 0.
        scale: mean(e^2) of the error e ("mse"), or this divided by the mean of |e| ("adaptive").
    """
    error = per_row(sigma, v) * (v_old - v) - move
    return error.square().flatten(1).mean(1) if scale == "mse" else normalized(error)


def next_tau(
    tau: float,
    acceptance: float,
    target: tuple[float, float],
    factor: float,
    bounds: tuple[float, float],
) -> float:
    """tau of the next rollout: larger if few candidates were accepted, smaller if many were.

    Args:
        tau: tau of this rollout.
        acceptance: accepted images / images below their cap.
        target: below the first number tau is multiplied by `factor`, above the second divided.
        factor: above 1.
        bounds: smallest and largest tau.
    """
    low, high = target
    if acceptance < low:
        tau *= factor
    elif acceptance > high:
        tau /= factor
    return min(max(tau, bounds[0]), bounds[1])
