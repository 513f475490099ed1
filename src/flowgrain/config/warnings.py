"""Warnings about settings that are valid, but probably not what the user wants."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flowgrain.distributed.threads import available_cores
from flowgrain.methods import DifferentiableReward, ForwardProcess, RewardGradient
from flowgrain.methods.cost import num_updates
from flowgrain.methods.forward_process import Draws
from flowgrain.models.base import ModelConfig
from flowgrain.rewards import REWARDS, is_differentiable
from flowgrain.settings import printable

if TYPE_CHECKING:
    from flowgrain.config.schema import Config

_HIGH_LEARNING_RATE = 0.1
_IGNORED = {
    "shapes": (
        *("revision", "height", "width", "t5", "embedding_cache", "vae_tiling"),
        *("attention_backend", "max_prompt_tokens"),
    ),
    **dict.fromkeys(("flux", "flux2", "qwen_image", "zimage"), ("t5",)),
}
"""Settings of the section `model` that a built-in backbone does not use."""


def warnings_of(config: "Config") -> Iterator[str]:
    """One line for each setting of `config` that has no effect or an effect that surprises.

    Raises:
        SettingsError: the tree has too many rows.
    """
    for reward in config.rewards:
        if reward.weight < 0:
            yield (
                f"rewards[{reward.name}].weight={reward.weight:g}: the weight is negative, so "
                "training makes this reward smaller."
            )
    yield from _of_optimizer(config)
    yield from _of_updates(config)
    yield from _of_rewards(config)
    yield from _of_draws(config)
    model = config.model
    for name in _IGNORED.get(model.name, ()):
        value = getattr(model, name)
        if value != ModelConfig.model_fields[name].default:
            yield f"model.{name}={printable(value)}: has no effect with model.name={model.name}."
    threads, cores = config.runtime.threads, available_cores()
    if threads > cores:
        yield f"runtime.threads={threads}: more threads than the {cores} CPU cores are slower."


def _of_optimizer(config: "Config") -> Iterator[str]:
    rate, betas = config.learning_rate, list(config.optimizer.betas)
    if rate > _HIGH_LEARNING_RATE:
        yield (
            f"optimizer.learning_rate={rate:g}: very high. The published rates are between 1e-6 "
            "and 1e-3."
        )
    if not any(betas):
        yield (
            f"optimizer.betas={betas}: AdamW keeps no averages, so an update only uses the sign of "
            "the gradient."
        )


def _of_rewards(config: "Config") -> Iterator[str]:
    """Check whether the rewards are differentiable. A training checks those that it has loaded."""
    if isinstance(config.method, DifferentiableReward):
        for name in config.reward_weights:
            if name in REWARDS and not is_differentiable(REWARDS.get(name)):
                yield (
                    f"rewards[{name}]: method {config.method.name!r} trains on the gradient of its "
                    "rewards, but this reward is not differentiable. The run will be refused."
                )


def _of_draws(config: "Config") -> Iterator[str]:
    """Check whether the grid has enough levels for the draws of an image."""
    method, steps = config.method, config.sampling.num_steps
    if isinstance(method, Draws) and method.num_levels(steps) < method.draws:
        yield (
            f"method.draws={method.draws}: with method.levels={method.levels} and "
            f"sampling.num_steps={steps}, the range has only {method.num_levels(steps)} levels, "
            "each of which is drawn once."
        )


def _of_updates(config: "Config") -> Iterator[str]:
    """Check whether there is enough to divide among the updates of a rollout."""
    method, prompts = config.method, config.training.prompts_per_step
    wanted = method.updates_per_rollout
    if wanted == "per_step" or isinstance(method, RewardGradient):  # checked by the method
        return
    actual = num_updates(method, config.tree(), prompts)
    images = isinstance(method, ForwardProcess)
    name, value = ("group_size", method.group_size) if images else ("prompts_per_step", prompts)
    section = "method" if images else "training"
    if actual < int(wanted):
        yield (
            f"method.updates_per_rollout={wanted}: with {section}.{name}={value}, a rollout can "
            f"only be divided into {actual} updates."
        )
