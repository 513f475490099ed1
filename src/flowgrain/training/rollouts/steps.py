"""Prompts, tree and noise of a training step. They are functions of the settings and the step."""

from collections.abc import Sequence

from flowgrain.config.schema import Config
from flowgrain.core.rollout import Noise
from flowgrain.core.tree import Tree
from flowgrain.data import Prompt, keyed_noise, prompts_of_step
from flowgrain.methods import Method, plan_tree


def step_prompts(config: Config, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
    """The prompts of training step `step` among `prompts`, over all ranks."""
    return prompts_of_step(prompts, step, config.training.prompts_per_step, config.runtime.seed)


def step_tree(config: Config, method: Method, step: int) -> Tree:
    """The tree of one prompt at training step `step`."""
    steps, seed = config.sampling.num_steps, config.runtime.seed
    return plan_tree(method, steps, step, seed, config.sigmas().tolist())


def step_noise(config: Config, shape: Sequence[int], step: int) -> Noise:
    """The noise of training step `step`. A prompt number is the position in the step.

    Args:
        config: settings of the run.
        shape: L, shape of a latent.
        step: training step.
    """
    return keyed_noise(shape, "train", config.runtime.seed, step)
