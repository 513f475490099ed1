"""Images of held-out prompts and every metric on them, from the same noise every time."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from flowgrain.models import take
from flowgrain.training.policy import Policy
from flowgrain.data import latent_noise
from flowgrain.rewards import Reward, explained
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import ODE
from flowgrain.config.schema import Settings
from flowgrain.core.tree import Planner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """scores[metric] [I] with NaN where a reward failed; parts and weights ["metric/part"] [I], where a reward has parts."""

    prompts: list[str]
    num_steps: int
    scores: dict[str, NDArray[np.float32]]
    parts: dict[str, NDArray[np.float32]]
    weights: dict[str, NDArray[np.float32]]
    images: Tensor

    def means(self) -> dict[str, float]:
        """Mean of each metric over the images that were scored."""
        return {name: mean(values) for name, values in self.scores.items()}

    def part_means(self) -> dict[str, float]:
        """Weighted mean of each part."""
        return {name: mean(values, self.weights.get(name)) for name, values in self.parts.items()}


def mean(values: NDArray[np.floating], weights: NDArray[np.floating] | None = None) -> float:
    """Mean of finite `values`, weighted or not; NaN if there is none."""
    there = np.isfinite(values)
    weights = np.ones(len(values)) if weights is None else weights
    return float((values[there] * weights[there]).sum() / weights[there].sum()) if weights[there].sum() > 0 else float("nan")


def joined(parts: Sequence[Evaluation], prompts: list[str]) -> Evaluation:
    """One evaluation of `prompts` from those of the processes to which they were dealt in turn; its images are fewer."""

    def in_turn(values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.stack(values, 1).reshape(-1)[: len(prompts)]

    def column(kind: str, name: str) -> NDArray[np.float32]:
        nothing = np.full(len(parts[0].prompts), np.nan if kind != "weights" else 0.0, dtype=np.float32)
        return in_turn([getattr(part, kind).get(name, nothing) for part in parts])

    kinds = {
        kind: {name: column(kind, name) for name in dict.fromkeys(n for part in parts for n in getattr(part, kind))}
        for kind in ("scores", "parts", "weights")
    }
    images = torch.stack([part.images for part in parts], 1).flatten(0, 1)[: len(prompts)]
    return Evaluation(prompts, parts[0].num_steps, images=images, **kinds)


def interval(values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Mean and the ends of its 95% interval (Student's t) over finite `values`; NaN ends for fewer than two."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (float(values.mean()) if len(values) else float("nan"), float("nan"), float("nan"))
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    mean = float(values.mean())
    return mean, mean - half, mean + half


def sample(policy: Policy, prompts: Sequence[str], noise: Tensor, sigmas: Tensor, guidance: float, rows_per_pass: int) -> Tensor:
    """Images [I, 3, H, W] of `prompts` from the initial latents `noise` [I, *L], by ODE steps on the grid `sigmas` [T + 1]."""
    planner = Planner(len(sigmas) - 1)
    planner.image(planner.ode(planner.root()))
    cond = policy.encode(list(prompts))

    def velocity(x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return policy.sample_velocity(x, sigma, take(cond, prompt), guidance)

    tree = planner.tree().repeat(len(prompts))
    result = rollout(
        tree, velocity, ODE(), sigmas.to(policy.device), lambda prompt, _: noise[torch.from_numpy(prompt)], rows_per_pass
    )
    return decode(policy, result.at(tree.leaves), rows_per_pass)


def draw(policy: Policy, s: Settings, prompts: Sequence[str], num_steps: int, seed: int) -> Tensor:
    """Images [I, 3, H, W] in 0..1, one for each of `prompts`, with the averaged weights. Raises ValueError for unreadable ones."""
    policy.backbone.check(prompts)
    noise = torch.stack([latent_noise(policy.backbone.latent_shape, "sample", seed, i) for i in range(len(prompts))])
    with policy.averaged():
        return sample(policy, prompts, noise, s.grid(num_steps), s.eval_guidance, s.rows_per_pass)


def decode(policy: Policy, latents: Tensor, rows_per_pass: int) -> Tensor:
    """Images [I, 3, H, W] on the CPU of clean latents [I, *L], `rows_per_pass` at a time."""
    return torch.cat([policy.backbone.decode(part).cpu() for part in latents.split(rows_per_pass)])


def evaluation_noise(shape: Sequence[int], seed: int, places: Sequence[int]) -> Tensor:
    """Initial latents [I, *L] of the held-out images at `places`: of one seed they never change."""
    return torch.stack([latent_noise(shape, "evaluate", seed, i) for i in places])


def evaluate(
    policy: Policy,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    *,
    sigmas: Tensor,
    guidance: float,
    rows_per_pass: int,
    reward_batch: int = 256,
    seed: int = 0,
    places: Sequence[int] | None = None,
) -> Evaluation:
    """Samples an image for each of `prompts` with the averaged weights and scores it by every reward.

    The noise of an image is that of its place among all held-out prompts; by default they are all here.
    """
    images = []
    places = range(len(prompts)) if places is None else places
    with policy.averaged():
        for first in range(0, len(prompts), 4 * rows_per_pass):
            part = prompts[first : first + 4 * rows_per_pass]
            noise = evaluation_noise(policy.backbone.latent_shape, seed, places[first : first + len(part)])
            images.append(sample(policy, part, noise, sigmas, guidance, rows_per_pass))
    everything = torch.cat(images)
    scores: dict[str, NDArray[np.float32]] = {}
    parts: dict[str, NDArray[np.float32]] = {}
    weights: dict[str, NDArray[np.float32]] = {}
    for name, reward in rewards.items():
        found, of_part, weight_of_part = explained(reward, everything, prompts, reward_batch)
        if found.failed:
            log.warning("%s could not score %d of %d images: %s", name, found.failed, len(prompts), found.reason)
        scores[name] = found.values.numpy()
        parts |= {f"{name}/{part}": values.numpy() for part, values in of_part.items()}
        weights |= {f"{name}/{part}": values.numpy() for part, values in weight_of_part.items()}
    return Evaluation(list(prompts), len(sigmas) - 1, scores, parts, weights, everything)
