"""Transition kernels of rectified flow as Gaussians, and the shifted noise grid.

Shapes: B rows, *L latent. Sampling runs from sigma = 1 (pure noise) to sigma = 0 (image):
x_sigma = (1 - sigma) x0 + sigma eps. The model predicts the velocity v = eps - x0. A kernel returns
the transition p(x_next | x, v) = Normal(mean, std^2 I) of one grid step. Kernels do not depend on
models or trees.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Shift(NamedTuple):
    """The grid of a model's own pipeline: arguments of `sigma_grid`.

    Attributes:
        shift: timestep shift.
        terminal: last noise level above 0, to which the grid is stretched. None: not stretched.
        sigma_min: last linear level before the shift. None: 1 / T.
    """

    shift: float
    terminal: float | None = None
    sigma_min: float | None = None


def sigma_grid(
    num_steps: int,
    shift: float = 3.0,
    terminal: float | None = None,
    sigma_min: float | None = None,
) -> Tensor:
    """Noise levels [T + 1] of a T-step sampler, from 1 to 0, in float32.

    A linear grid is shifted: s -> shift s / (1 + (shift - 1) s). The last level is 0.

    Args:
        num_steps: T.
        shift: timestep shift.
        terminal: last noise level above 0. The grid is stretched to it (Qwen-Image's scheduler).
        sigma_min: the T levels above 0 are linspace(1, sigma_min, T) before the shift, as in the
            scheduler of SD3. Default: linspace(1, 1 / T, T).
    """
    s = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    if sigma_min is not None:
        s[:-1] = torch.linspace(1, sigma_min, num_steps, dtype=torch.float64)
    s = shift * s / (1 + (shift - 1) * s)
    if terminal is not None:
        s[:-1] = 1 - (1 - s[:-1]) * (1 - terminal) / (1 - s[-2])
    return s.float()


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """`values` [B] with trailing axes of length 1, to broadcast over `like` [B, *L]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Gaussian:
    """Normal(mean, std^2 I) over the latent of each row: mean [B, *L], std [B] in float32.

    With std 0 the distribution is a point.

    Attributes:
        mean: [B, *L].
        std: [B].
        squared_error: `log_prob` is the negative squared error, without variance and constants.
    """

    mean: Tensor
    std: Tensor
    squared_error: bool = False

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std noise, [B, *L]."""
        return self.mean + per_row(self.std, self.mean) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [B] in float32, averaged over latent dimensions.

        All methods average over latent dimensions. None of them sums. With `squared_error`, it is
        -||x - mean||^2, the published form of CPS.
        """
        if self.squared_error:
            return -(x.float() - self.mean).square().flatten(1).mean(1)
        z = (x.float() - self.mean) / per_row(self.std, self.mean)
        return -0.5 * z.square().flatten(1).mean(1) - self.std.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, other: "Gaussian") -> Tensor:
        """KL [B] to a Gaussian of the same std, averaged over latent dimensions.

        ||mean - mean'||^2 / (2 std^2), Flow-GRPO eq. 10.
        """
        distance = (self.mean - other.mean).square().flatten(1).mean(1)
        return distance / (2 * self.std.square())


@dataclass(frozen=True)
class Step:
    """The grid steps of B rows, from sigma [B] to sigma_next [B].

    index [B] is the grid index of sigma.
    """

    sigma: Tensor
    sigma_next: Tensor
    index: Tensor

    @staticmethod
    def on(sigmas: Tensor, start: Tensor, end: Tensor) -> "Step":
        """The steps from grid index `start` [B] to `end` [B] of the grid `sigmas` [T + 1]."""
        return Step(sigmas[start], sigmas[end], start)

    @property
    def dt(self) -> Tensor:
        """sigma_next - sigma < 0, [B]."""
        return self.sigma_next - self.sigma


class Kernel(Protocol):
    """The transition p(x_next | x, v) of one grid step, for x and v of shape [B, *L]."""

    def __call__(self, x: Tensor, v: Tensor, step: Step) -> Gaussian: ...


def _flow_sde(x: Tensor, v: Tensor, step: Step, s: Tensor) -> Gaussian:
    """The SDE with the marginals of the flow and noise strength s [B] (Flow-GRPO eq. 9).

    With s = 0 it is the ODE.
    """
    correction = s.square() / (2 * step.sigma) * step.dt
    v_scale = per_row(step.dt + correction * (1 - step.sigma), x)
    mean = x.float() * per_row(1 + correction, x) + v.float() * v_scale
    return Gaussian(mean, s * (-step.dt).sqrt())


def flow_strength(eta: float, step: Step) -> Tensor:
    """Noise strength s = eta sqrt(sigma / (1 - sigma)), [B].

    At sigma = 1 the denominator uses sigma_next (Flow-GRPO eq. 8).
    """
    level = torch.where(step.sigma >= 1, step.sigma_next, step.sigma)
    return eta * (step.sigma / (1 - level)).sqrt()


@dataclass(frozen=True)
class ODE:
    """The probability-flow step x + v dt, without noise."""

    def __call__(self, x: Tensor, v: Tensor, step: Step) -> Gaussian:
        mean = x.float() + v.float() * per_row(step.dt, x)
        return Gaussian(mean, torch.zeros_like(step.sigma))


def multistep(x: Tensor, v: Tensor, step: Step, x0_before: Tensor, sigma_before: Tensor) -> Tensor:
    """One deterministic second-order step, [B, *L]: midpoint DPM-Solver++(2M).

    Lu et al. 2022, algorithm 2. The first-order part is the Euler step.

    Args:
        x: [B, *L] state.
        v: [B, *L] its velocity.
        step: grid step. sigma_next must be above 0, where log-SNR is finite.
        x0_before: [B, *L] x0 estimate of the state before x.
        sigma_before: [B] noise level of that state. At sigma_before = 1 the second-order term is 0.
    """
    x, v = x.float(), v.float()
    x0_hat = x - per_row(step.sigma, x) * v
    before, now, after = (
        ((1 - sigma) / sigma).log() for sigma in (sigma_before, step.sigma, step.sigma_next)
    )
    gain = (1 - step.sigma_next) - (1 - step.sigma) * step.sigma_next / step.sigma
    slope = (after - now) / (now - before)
    correction = per_row(0.5 * gain * slope, x) * (x0_hat - x0_before.float())
    return x + v * per_row(step.dt, x) + correction


@dataclass(frozen=True)
class FlowSDE:
    """Flow-SDE(eta) of Flow-GRPO (eq. 9), MixGRPO and G2RPO."""

    eta: float = 0.7

    def __call__(self, x: Tensor, v: Tensor, step: Step) -> Gaussian:
        return _flow_sde(x, v, step, flow_strength(self.eta, step))


@dataclass(frozen=True)
class DanceSDE:
    """Dance-SDE(eta) of DanceGRPO: constant noise strength with a score correction.

    The score is -(x - (1 - sigma) x0_hat) / sigma^2.
    """

    eta: float = 0.3

    def __call__(self, x: Tensor, v: Tensor, step: Step) -> Gaussian:
        x, v = x.float(), v.float()
        x0_hat = x - per_row(step.sigma, x) * v
        score = -(x - per_row(1 - step.sigma, x) * x0_hat) / per_row(step.sigma.square(), x)
        mean = x + (v - self.eta**2 / 2 * score) * per_row(step.dt, x)
        return Gaussian(mean, self.eta * (-step.dt).sqrt())


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling (Flow-CPS).

    The total noise after the step is exactly sigma_next.

    Attributes:
        eta: noise strength in 0..1.
        squared_error: form of the log-probability, see `Gaussian`. The published code uses the
            squared error.
    """

    eta: float = 0.7
    squared_error: bool = False

    def __call__(self, x: Tensor, v: Tensor, step: Step) -> Gaussian:
        x, v = x.float(), v.float()
        std = step.sigma_next * math.sin(self.eta * math.pi / 2)
        x0_hat = x - per_row(step.sigma, x) * v
        eps_hat = x + per_row(1 - step.sigma, x) * v
        kept = (step.sigma_next.square() - std.square()).clamp(min=0).sqrt()
        mean = per_row(1 - step.sigma_next, x) * x0_hat + per_row(kept, x) * eps_hat
        return Gaussian(mean, std, self.squared_error)


@dataclass(frozen=True)
class CalibratedSDE:
    """Flow-SDE with a separate strength psi[i] for every grid step i (DenseGRPO)."""

    psi: tuple[float, ...]

    def __call__(self, x: Tensor, v: Tensor, step: Step) -> Gaussian:
        return _flow_sde(x, v, step, torch.tensor(self.psi, device=x.device)[step.index])
