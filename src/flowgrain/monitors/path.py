"""KL of a policy to the base model along the sampling path.

The states of the base model's ODE trajectories and its velocities are stored before training. Later
only the velocities of the policy at the same states are computed. No copy of the base model is
needed.

Shapes: P prompts, K states of a trajectory, *L latent.
"""

import torch
from torch import Tensor

from flowgrain.core.sde import FlowSDE, Step

ETA = 0.7
"""Noise strength of the transitions, as in Flow-GRPO."""
STATES = 4
"""Largest number of states of a trajectory."""


def chosen_steps(num_steps: int) -> list[int]:
    """Evenly spaced grid steps, at most `STATES` of them, with the first and the last."""
    count = min(STATES, num_steps)
    return sorted({round(i * (num_steps - 1) / max(count - 1, 1)) for i in range(count)})


def path_kl(x: Tensor, v: Tensor, base: Tensor, sigmas: Tensor) -> Tensor:
    """KL [P] per latent dimension of Flow-SDE transitions, mean over the states of a trajectory.

    Args:
        x: [P, K, *L] states at the `chosen_steps` of the grid.
        v: [P, K, *L] velocities of the policy.
        base: [P, K, *L] velocities of the base model.
        sigmas: [T + 1] grid.
    """
    prompts, states = x.shape[:2]
    start = torch.tensor(chosen_steps(len(sigmas) - 1)).repeat(prompts)
    step, kernel = Step.on(sigmas, start, start + 1), FlowSDE(ETA)
    flat, of_policy, of_base = x.flatten(0, 1), v.flatten(0, 1), base.flatten(0, 1)
    kl = kernel(flat, of_policy, step).kl(kernel(flat, of_base, step))
    return kl.reshape(prompts, states).mean(1)
