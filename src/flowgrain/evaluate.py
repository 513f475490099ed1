"""Images of held-out prompts and every metric on them, from the same noise every time."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from flowgrain.backbones import take
from flowgrain.policy import Policy
from flowgrain.prompts import latent_noise
from flowgrain.rewards import Explains, Reward, score
from flowgrain.rollout import rollout
from flowgrain.sde import ODE, sigma_grid
from flowgrain.tree import Planner


@dataclass(frozen=True)
class Evaluation:
    """scores[metric] [I] with NaN where a reward failed; failures[kind] share of images, if the model's world knows kinds."""

    prompts: list[str]
    num_steps: int
    scores: dict[str, NDArray[np.float32]]
    failures: dict[str, float]
    images: Tensor

    def means(self) -> dict[str, float]:
        """Mean of each metric over the images that were scored."""
        return {
            name: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan") for name, values in self.scores.items()
        }


def interval(values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Mean and the ends of its 95% interval (Student's t) over finite `values`; NaN ends for fewer than two."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (float(values.mean()) if len(values) else float("nan"), float("nan"), float("nan"))
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    mean = float(values.mean())
    return mean, mean - half, mean + half


def sample(
    policy: Policy, prompts: Sequence[str], noise: Tensor, num_steps: int, shift: float, guidance: float, rows_per_pass: int
) -> Tensor:
    """Images [I, 3, H, W] of `prompts` from the initial latents `noise` [I, *L], by `num_steps` ODE steps."""
    planner = Planner(num_steps)
    planner.image(planner.ode(planner.root()))
    cond = policy.encode(list(prompts))

    def velocity(x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return policy.sample_velocity(x, sigma, take(cond, prompt), guidance)

    tree = planner.tree().repeat(len(prompts))
    sigmas = sigma_grid(num_steps, shift).to(policy.device)
    result = rollout(tree, velocity, ODE(), sigmas, lambda prompt, _: noise[torch.from_numpy(prompt)], rows_per_pass)
    return decode(policy, result.at(tree.leaves), rows_per_pass)


def decode(policy: Policy, latents: Tensor, rows_per_pass: int) -> Tensor:
    """Images [I, 3, H, W] on the CPU of clean latents [I, *L], `rows_per_pass` at a time."""
    return torch.cat([policy.backbone.decode(part).cpu() for part in latents.split(rows_per_pass)])


def evaluation_noise(shape: Sequence[int], seed: int, first: int, count: int) -> Tensor:
    """Initial latents [count, *L] of held-out images `first` onwards: of one seed they never change."""
    return torch.stack([latent_noise(shape, "evaluate", seed, i) for i in range(first, first + count)])


def evaluate(
    policy: Policy,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    *,
    num_steps: int,
    shift: float,
    guidance: float,
    rows_per_pass: int,
    reward_batch: int = 256,
    seed: int = 0,
) -> Evaluation:
    """Samples an image for each of `prompts` with the averaged weights and scores it by every reward."""
    images = []
    with policy.averaged():
        for first in range(0, len(prompts), 4 * rows_per_pass):
            part = prompts[first : first + 4 * rows_per_pass]
            noise = evaluation_noise(policy.backbone.latent_shape, seed, first, len(part))
            images.append(sample(policy, part, noise, num_steps, shift, guidance, rows_per_pass))
    everything = torch.cat(images)
    scores: dict[str, NDArray[np.float32]] = {}
    failures: dict[str, float] = {}
    for name, reward in rewards.items():
        scores[name] = score(reward, everything, prompts, reward_batch).values.numpy()
        if isinstance(reward, Explains):
            with contextlib.suppress(Exception):  # foreign code, and only an explanation
                shown = reward.failures(everything, list(prompts))
                failures.update({kind: float(np.mean(images_with_it)) for kind, images_with_it in shown.items()})
    return Evaluation(list(prompts), num_steps, scores, failures, everything)
