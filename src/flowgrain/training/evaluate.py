"""Evaluation: images of held-out prompts from fixed noise, and their scores.

Shapes: I images, *L latent, H x W pixels.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import ODE
from flowgrain.core.tree import Planner
from flowgrain.data import Prompt, as_prompts, latent_noise
from flowgrain.models import take
from flowgrain.monitors.features import FeatureNet, Features
from flowgrain.rewards import Reward, score_with_parts
from flowgrain.training.decode import Decoded, decode
from flowgrain.training.policy import Policy
from flowgrain.training.signals import check_stop, interruptible, stop_together

log = logging.getLogger(__name__)

Column = NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """Images of prompts and their scores.

    Attributes:
        prompts: I prompts.
        num_steps: ODE steps.
        scores: [I] by reward. NaN: the reward failed.
        parts: [I] by "reward/part", for rewards that report parts.
        part_weights: [I] by "reward/part", weights of the images in the mean of the part.
        images: [I, 3, H, W], or only the first images.
        reasons: by reward, why images have no score. Only rewards that failed.
        monitors: [I] by monitor. NaN: not available. Empty if nothing was measured.
        features: [I, D] features of the images, if there is a network for them.
    """

    prompts: list[Prompt]
    num_steps: int
    scores: dict[str, Column]
    parts: dict[str, Column]
    part_weights: dict[str, Column]
    images: Tensor
    reasons: dict[str, str | None] = field(default_factory=dict)
    monitors: dict[str, Column] = field(default_factory=dict)
    features: Features | None = None

    def means(self) -> dict[str, float]:
        """Mean score of each reward over the scored images."""
        return {name: mean(values) for name, values in self.scores.items()}

    def part_means(self) -> dict[str, float]:
        """Weighted mean of each part."""
        weights = self.part_weights
        return {name: mean(values, weights.get(name)) for name, values in self.parts.items()}


def mean(values: NDArray[np.floating], weights: NDArray[np.floating] | None = None) -> float:
    """Weighted mean of the finite `values`. NaN if no value is finite."""
    finite = np.isfinite(values)
    weights = np.ones(len(values)) if weights is None else weights
    total = weights[finite].sum()
    return float((values[finite] * weights[finite]).sum() / total) if total > 0 else float("nan")


def interleave(parts: Sequence[Evaluation], prompts: list[Prompt]) -> Evaluation:
    """The evaluation of `prompts`, from the evaluations `parts` of all ranks."""
    columns = {
        kind: _interleaved_columns([getattr(part, kind) for part in parts], fill, parts[0], prompts)
        for kind, fill in (
            ("scores", np.nan),
            ("parts", np.nan),
            ("part_weights", 0.0),
            ("monitors", np.nan),
        )
    }
    images = torch.stack([part.images for part in parts], 1).flatten(0, 1)[: len(prompts)]
    reasons = {name: reason for part in parts for name, reason in part.reasons.items()}
    of_ranks = [part.features for part in parts if part.features is not None]
    features = interleave_rows(of_ranks, len(prompts)) if of_ranks else None
    return Evaluation(
        prompts,
        parts[0].num_steps,
        images=images,
        reasons=reasons,
        features=features,
        **columns,
    )


def interleave_rows(of_ranks: Sequence[Features], count: int) -> Features:
    """Rows [count, ...] of all items, from the rows of every rank, see `World.assign`."""
    stacked = np.stack(of_ranks, 1)
    rows: Features = stacked.reshape(-1, *stacked.shape[2:])[:count]
    return rows


def _interleaved_columns(
    of_ranks: Sequence[Mapping[str, Column]], fill: float, first: Evaluation, prompts: list[Prompt]
) -> dict[str, Column]:
    missing = np.full(len(first.prompts), fill, dtype=np.float32)
    names = dict.fromkeys(name for columns in of_ranks for name in columns)
    return {
        name: np.stack([c.get(name, missing) for c in of_ranks], 1).reshape(-1)[: len(prompts)]
        for name in names
    }


def sample(
    policy: Policy,
    texts: Sequence[str],
    noise: Tensor,
    sigmas: Tensor,
    guidance: float,
    batch_size: int,
    measured: bool = False,
) -> Decoded:
    """Images [I, 3, H, W] by the ODE, and their monitors if they are `measured`.

    Args:
        policy: the policy that samples.
        texts: I prompts.
        noise: [I, *L] initial latents.
        sigmas: [T + 1] grid.
        guidance: guidance scale.
        batch_size: rows of one model call.
        measured: whether to measure the monitors of the images.
    """
    planner = Planner(len(sigmas) - 1)
    planner.image(planner.ode(planner.root()))
    cond = policy.encode(list(texts))

    def velocity(x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        check_stop(policy.world)
        return policy.sample_velocity(x, sigma, take(cond, prompt), guidance)

    tree = planner.tree().repeat(len(texts))
    result = rollout(
        tree,
        velocity,
        ODE(),
        sigmas.to(policy.device),
        lambda prompt, _: noise[torch.from_numpy(prompt)],
        batch_size,
    )
    return decode(policy, result.at(tree.leaves), batch_size, measured)


def sample_images(
    policy: Policy, config: Config, texts: Sequence[str], num_steps: int, seed: int
) -> Tensor:
    """Images [I, 3, H, W] in 0..1 of `texts`, with the EMA parameters.

    Raises:
        ValueError: the backbone cannot encode a text.
    """
    policy.backbone.check(texts)
    shape = policy.backbone.latent_shape
    noise = torch.stack([latent_noise(shape, "sample", seed, i) for i in range(len(texts))])
    sigmas, batch_size = config.sigmas(num_steps), config.sampling.batch_size
    with policy.averaged():
        return sample(policy, texts, noise, sigmas, config.eval_guidance, batch_size).images


def evaluate_on_ranks(
    policy: Policy,
    config: Config,
    prompts: Sequence[str | Prompt],
    rewards: Mapping[str, Reward],
    *,
    num_steps: int,
    num_images: int,
    net: FeatureNet | None = None,
) -> Evaluation:
    """Evaluate `prompts` with the settings of a run. Every rank evaluates its share.

    Args:
        policy: the policy that samples.
        config: settings of the run.
        prompts: prompts of all ranks.
        rewards: rewards by name.
        num_steps: ODE steps.
        num_images: minimum number of images in the result. A single rank returns all images.
        net: network for the features of the images. None: no features.
    """
    chosen, world = as_prompts(prompts), policy.world
    assigned = world.assign(len(chosen))
    evaluation = evaluate(
        policy,
        [chosen[i % len(chosen)] for i in assigned],
        rewards if world.is_first_of_group else {},
        sigmas=config.sigmas(num_steps),
        guidance=config.eval_guidance,
        batch_size=config.sampling.batch_size,
        reward_batch_sizes=config.reward_batch_sizes,
        places=assigned.tolist(),
        measured=config.watch.action != "off",
    )
    if net is not None:
        evaluation = replace(evaluation, features=net(evaluation.images))
    stop_together(world)
    if world.size == 1:
        return evaluation
    # Ranks exchange only a few images, because all images can take gigabytes.
    first = replace(evaluation, images=evaluation.images[: -(-num_images // world.data_size)])
    return interleave(world.gather_data(first), chosen)


def evaluation_noise(shape: Sequence[int], seed: int, places: Sequence[int]) -> Tensor:
    """Initial latents [I, *L] of evaluation images, determined by the seed and the places [I]."""
    return torch.stack([latent_noise(shape, "evaluate", seed, i) for i in places])


def evaluate(
    policy: Policy,
    prompts: Sequence[str | Prompt],
    rewards: Mapping[str, Reward],
    *,
    sigmas: Tensor,
    guidance: float,
    batch_size: int,
    reward_batch_sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    places: Sequence[int] | None = None,
    measured: bool = False,
) -> Evaluation:
    """Sample an image for each prompt with the EMA parameters, and score it by every reward.

    Args:
        policy: the policy that samples.
        prompts: I prompts.
        rewards: by name.
        sigmas: [T + 1] grid.
        guidance: guidance scale.
        batch_size: rows of one model call.
        reward_batch_sizes: images of one reward call by name. Default: 256.
        seed: seed of the initial noise.
        places: position of each prompt among all evaluation prompts. It determines the noise.
            Default: 0 to I - 1.
        measured: whether to measure the monitors of the images.
    """
    parts, prompts = [], as_prompts(prompts)
    places = range(len(prompts)) if places is None else places
    chunk_size = 4 * batch_size
    with policy.averaged():
        for first in range(0, len(prompts), chunk_size):
            texts = [prompt.text for prompt in prompts[first : first + chunk_size]]
            of_chunk = places[first : first + len(texts)]
            noise = evaluation_noise(policy.backbone.latent_shape, seed, of_chunk)
            parts.append(sample(policy, texts, noise, sigmas, guidance, batch_size, measured))
    decoded = Decoded.concatenate(parts)
    monitors = {name: values.numpy() for name, values in decoded.monitors.items()}
    evaluation = Evaluation(prompts, len(sigmas) - 1, {}, {}, {}, decoded.images, monitors=monitors)
    for name, reward in rewards.items():
        size = (reward_batch_sizes or {}).get(name, 256)
        interruptible(policy.world, partial(_add_scores, evaluation, name, reward, size))
    return evaluation


def warn_of_failures(evaluation: Evaluation) -> None:
    """Log a warning for each reward that could not score all images."""
    for name, reason in evaluation.reasons.items():
        scores = evaluation.scores[name]
        failed = int((~np.isfinite(scores)).sum())
        log.warning("%s could not score %d of %d images: %s", name, failed, len(scores), reason)


def _add_scores(evaluation: Evaluation, name: str, reward: Reward, batch_size: int) -> None:
    """Add the scores and the parts of a reward to `evaluation`."""
    images, prompts = evaluation.images, evaluation.prompts
    scores, parts, weights = score_with_parts(reward, images, prompts, batch_size)
    if scores.failed:
        evaluation.reasons[name] = scores.reason
    evaluation.scores[name] = scores.values.numpy()
    evaluation.parts.update({f"{name}/{part}": v.numpy() for part, v in parts.items()})
    evaluation.part_weights.update({f"{name}/{part}": v.numpy() for part, v in weights.items()})
