"""Real plans and rollouts, driven by the velocity field and the noise of golden trajectories."""

from collections.abc import Mapping

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from golden.comparison import golden
from torch import Tensor

from flowgrain.core.rollout import Noise, Velocity
from flowgrain.core.sde import sigma_grid
from flowgrain.core.tree import Ints
from flowgrain.models.shift import scheduler_shift


def velocity_field(timesteps: Mapping[float, float] | None = None) -> Velocity:
    """The velocity 0.5 x + 0.3 sin(2 x) - 0.4 t + 0.1 of the golden trajectories.

    Args:
        timesteps: timestep that the published transformer receives at a noise level (float32).
            Default: 1000 sigma.
    """

    def velocity(x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        if timesteps is None:
            t = sigma
        else:
            t = torch.tensor([timesteps[level] for level in sigma.tolist()]) / 1000
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        return 0.5 * x + 0.3 * torch.sin(2 * x) - 0.4 * t + 0.1

    return velocity


def truncated_timesteps(num_steps: int, sigmas: Tensor) -> dict[float, float]:
    """Truncated timestep of every noise level of the grid `sigmas` with shift 3."""
    for case in golden("grids")["linear_shifted"]:
        if case["num_steps"] == num_steps and case["shift"] == 3:
            return dict(zip(sigmas[:-1].tolist(), case["truncated_timesteps"], strict=True))
    raise KeyError(num_steps)


def noise_table(draws: Mapping[int, Tensor]) -> Noise:
    """A noise source that returns recorded samples by the number of the draw."""

    def noise(prompt: Ints, draw: Ints) -> Tensor:
        return torch.stack([draws[number] for number in draw.tolist()])

    return noise


def sd3_grid(num_steps: int, shift: float) -> Tensor:
    """The grid of an SD3 pipeline with constant shift, as `SD3Backbone.natural_shift` gives it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    natural = scheduler_shift(scheduler.config, 0.0)._replace(sigma_min=scheduler.sigma_min)
    return sigma_grid(num_steps, *natural)
