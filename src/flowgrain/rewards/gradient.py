"""Gradients of rewards with respect to the images.

A differentiable reward is a class or a function with `differentiable = True`. A call with images
that require a gradient returns scores with a graph. Its preprocessing must consist of torch
operations, without conversions to bytes or to PIL.

Shapes: I images, H x W pixels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from flowgrain.data import Prompt, as_prompts
from flowgrain.rewards.base import Reward
from flowgrain.rewards.scoring import BATCH_SIZE

T = TypeVar("T", bound=Callable[..., Any])

DIFFERENTIABLE = ("clip", "pickscore", "hps", "aesthetic", "imagereward", "towers", "preference")
"""The differentiable rewards of this package."""


@runtime_checkable
class Differentiable(Protocol):
    """A reward that says whether its scores have a gradient.

    Attributes:
        differentiable: whether the scores have a gradient with respect to the images.
    """

    differentiable: bool


class NoGradient(TypeError):
    """The scores of a reward have no gradient with respect to the images."""


def differentiable(reward: T) -> T:
    """Decorator that declares a class or a function as a differentiable reward.

    Example:
        >>> @differentiable
        ... def brightness(images, prompts):
        ...     return images.mean((1, 2, 3))
    """
    declared: Any = reward
    declared.differentiable = True
    return reward


def is_differentiable(reward: Reward) -> bool:
    """Whether `reward` is declared as differentiable."""
    function = reward.func if isinstance(reward, functools.partial) else reward
    return isinstance(function, Differentiable) and bool(function.differentiable)


def is_custom(reward: Reward) -> bool:
    """Whether `reward` is not a reward of this package."""
    function = reward.func if isinstance(reward, functools.partial) else reward
    return not str(getattr(function, "__module__", "")).startswith("flowgrain.")


def gradient(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str | Prompt],
    batch_size: int = BATCH_SIZE,
) -> tuple[Tensor, Tensor]:
    """Scores of images and their gradients with respect to the images.

    The graph of a batch is freed before the next batch.

    Args:
        reward: a differentiable reward. The score of an image must not depend on other images.
        images: images [I, 3, H, W] in 0..1.
        prompts: prompt of each image.
        batch_size: images in one call of the reward.

    Returns:
        Scores [I] and gradients [I, 3, H, W], in float32 on the device of `images`.

    Raises:
        NoGradient: the scores have another shape or no gradient.
    """
    prompts, call = as_prompts(prompts), cast(Callable[..., Any], reward)
    scores, gradients = [], []
    for first in range(0, len(images), batch_size):
        leaf = images[first : first + batch_size].detach().float().requires_grad_()
        with torch.enable_grad():
            # A copy, because a reward may change its images in place.
            values: Any = call(leaf.clone(), prompts[first : first + batch_size])
            _check(values, len(leaf))
            (of_batch,) = torch.autograd.grad(values.float().sum(), leaf)
        scores.append(values.detach().float().to(images.device))
        gradients.append(of_batch)
    return torch.cat(scores), torch.cat(gradients)


def total_gradient(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    images: Tensor,
    prompts: Sequence[str | Prompt],
    batch_sizes: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of several rewards [I] and its gradient [I, 3, H, W]. See `gradient`."""
    total = torch.zeros(len(images), device=images.device)
    slope = torch.zeros_like(images, dtype=torch.float32)
    for name, reward in rewards.items():
        size = (batch_sizes or {}).get(name, BATCH_SIZE)
        scores, gradients = gradient(reward, images, prompts, size)
        total = total + weights[name] * scores
        slope = slope + weights[name] * gradients
    return total, slope


def _check(values: Any, count: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (count,):
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise NoGradient(f"the reward returned {shape} for {count} images, not a tensor [{count}]")
    if not values.requires_grad:
        raise NoGradient(
            "the reward is declared as differentiable, but its scores have no gradient. "
            "Use only torch operations, without torch.no_grad and detach"
        )
