"""Check that the noise grid and the transition kernel of a configuration are usable numbers."""

import torch
from torch import Tensor

from flowgrain.config.sections import SamplingConfig
from flowgrain.core.sde import Step
from flowgrain.methods import Method, PolicyGradient

_LARGEST_STD = 1e4
"""Largest standard deviation of a stochastic step. A latent has a standard deviation of about 1."""


def check_noise(method: Method, sigmas: Tensor, sampling: SamplingConfig) -> None:
    """Check the noise levels, and the noise of every step except the step into sigma = 0.

    Args:
        method: method with the transition kernel.
        sigmas: [T + 1] noise levels.
        sampling: settings of the grid, for the message.

    Raises:
        ValueError: in float32, two levels are equal, or the noise of a step is 0, not finite or
            very large.
    """
    falling = bool((sigmas[1:] < sigmas[:-1]).all() and sigmas.isfinite().all())
    if not falling:
        given = {
            f"sampling.{name}": getattr(sampling, name)
            for name in ("shift", "shift_terminal", "sigma_min")
        }
        name, value = next(
            ((name, value) for name, value in given.items() if value not in (None, "auto")),
            ("sampling.num_steps", sampling.num_steps),
        )
        raise ValueError(
            f"{name}={value}: with sampling.num_steps={sampling.num_steps}, two noise levels of "
            "the grid are equal in float32. Use a value closer to the default."
        )
    if not isinstance(method, PolicyGradient):
        return
    index = torch.arange(len(sigmas) - 2)
    ones = torch.ones(len(index), 1)
    transition = method.kernel(sigmas)(ones, ones, Step.on(sigmas, index, index + 1))
    std = transition.std
    usable = (std > 0) & (std < _LARGEST_STD) & transition.mean.isfinite().flatten(1).all(1)
    if not bool(usable.all()):
        step = int(index[~usable][0])
        name = "eta" if method.psi is None else "psi"
        raise ValueError(
            f"method.{name}={getattr(method, name)}: the noise of grid step {step} has the "
            f"standard deviation {float(std[step]):g}. Use a value closer to the default."
        )
