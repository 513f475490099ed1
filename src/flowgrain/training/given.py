"""The batch of a training step on given images, in place of a rollout.

Shapes: P prompts, I images, K images of a prompt, H x W pixels, *L latent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.given import given_rollout
from flowgrain.data import Prompt
from flowgrain.distributed import World
from flowgrain.image_data import ImagePrompt, load_images
from flowgrain.models import ImageEncoder
from flowgrain.training.disk import image_size
from flowgrain.training.errors import RunStopped, stop_all
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import RolloutBatch
from flowgrain.training.signals import check_stop
from flowgrain.training.timer import StageTimer

ADVANTAGES = {"pairs": (1.0, -1.0), "images": (1.0,)}
"""Advantages of the images of a prompt: the preferred and the rejected image, or a single image."""


def given_batch(
    config: Config,
    policy: Policy,
    prompts: list[Prompt],
    step: int,
    world: World,
    timer: StageTimer,
) -> RolloutBatch:
    """The images of a data set as a rollout batch without rewards.

    Args:
        config: settings, with a data set of images.
        policy: encodes prompts and images.
        prompts: P prompts of the step, over all ranks, with their images.
        step: training step.
        world: ranks. A rank loads and encodes the images of its prompts, see `World.assign`.
        timer: measures the stages.

    Raises:
        RunStopped: on all ranks, if an image of any rank cannot be read, or its latent has a wrong
            shape.
        StopRequested: a signal arrived.
    """
    kind = config.data.kind
    assert kind is not None
    mine = [prompts[i % len(prompts)] for i in world.assign(len(prompts))]
    with timer.measure("encode"):
        cond = policy.encode([prompt.text for prompt in mine])
        images = latents = torch.zeros(0)
        failure = None
        try:
            images = _load(config, mine)
            latents = _encode(policy, images, world)
        except RunStopped as error:
            failure = str(error)
        stop_all(world, failure)
    tree = config.tree(step)
    whole = tree.repeat(len(prompts))
    advantage = torch.tensor(ADVANTAGES[kind]).repeat(len(prompts))
    return RolloutBatch(
        step=step,
        prompts=prompts,
        tree=whole,
        world=world,
        cond=cond,
        rollout=given_rollout(tree.repeat(len(mine)), latents),
        images=images,
        scores={},
        credited=whole.leaves,
        advantage=advantage,
        edge_weight=torch.ones_like(advantage),
        known=torch.ones_like(advantage, dtype=torch.bool),
        rewards={},
        reward_weights={},
    )


def _load(config: Config, prompts: Sequence[Prompt]) -> Tensor:
    """Images [I, 3, H, W] of `prompts`, in the size of the model."""
    height, width = image_size(config)
    try:
        images = [load_images(p, height, width) for p in prompts if isinstance(p, ImagePrompt)]
    except ValueError as error:
        raise RunStopped(str(error)) from error
    return torch.cat(images)


@torch.no_grad()
def _encode(policy: Policy, images: Tensor, world: World) -> Tensor:
    """Latents [I, *L] of `images`.

    Images are encoded one at a time. In a batch, the last bits depend on the other images, and
    another number of ranks has other batches.
    """
    backbone = policy.backbone
    assert isinstance(backbone, ImageEncoder)
    latents, expected = [], (1, *policy.backbone.latent_shape)
    for image in images:
        check_stop(world)
        latents.append(backbone.encode_images(image[None].to(policy.device)).float())
        if latents[-1].shape != expected:
            raise RunStopped(
                f"backbone {type(backbone).__name__}: encode_images returns a tensor "
                f"{list(latents[-1].shape)}, but the latent of an image is {list(expected)}"
            )
    return torch.cat(latents)
