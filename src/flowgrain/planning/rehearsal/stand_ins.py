"""Stand-ins for rewards and prompts: scores without a model, and prompts without a file."""

import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.data import Prompt
from flowgrain.image_data import ImagePrompt
from flowgrain.models import Backbone
from flowgrain.planning.rehearsal.ledger import Ledger
from flowgrain.rewards import Reward, RewardConfig, differentiable

PARAMETERS: Mapping[str, int] = {
    "clip": 986_109_441,
    "hps": 986_109_441,
    "pickscore": 985_512_705,
    "aesthetic": 428_614_146,
    "imagereward": 473_996_545,
}
"""Parameters of rewards that run in the training process: ViT-H-14, ViT-L-14, and BLIP."""


class _StandIn:
    """Scores that depend on the image only through its graph."""

    def __init__(self, weights: Tensor | None) -> None:
        self.weights = weights

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Different scores [I] of images [I, 3, H, W]."""
        if images.requires_grad:
            return images.float().mean((1, 2, 3))
        return torch.linspace(0, 1, len(prompts))


def rewards_of(
    config: Config, device: torch.device, ledger: Ledger
) -> tuple[dict[str, Reward], list[Tensor]]:
    """A stand-in for every trained reward, which holds the memory of the reward's model.

    Also returns the memory of the other rewards of evaluations, which a run loads at its start.
    """
    found: dict[str, Reward] = {}
    for reward in config.rewards:
        found[reward.name] = differentiable(_StandIn(_weights(reward, device, ledger)))
    others = [
        _weights(reward, device, ledger)
        for reward in config.evaluation.rewards
        if reward.name not in found
    ]
    return found, [weights for weights in others if weights is not None]


def _weights(reward: RewardConfig, device: torch.device, ledger: Ledger) -> Tensor | None:
    """Memory of the model of a reward. None if it is not on the device, or not known."""
    count, options = PARAMETERS.get(reward.name, 0), reward.model_extra or {}
    on_device = str(options.get("device", "cpu")).startswith("cuda")
    weights = torch.empty(count, device=device) if count and on_device else None
    ledger.tag("rewards", [weights])
    return weights


def prompts_of(config: Config, backbone: Backbone) -> list[Prompt]:
    """A prompt for every place of a step, with images if the run trains on given images."""
    count, kind = config.training.prompts_per_step, config.data.kind
    text = next(iter(backbone.bundled_prompts("train")), "a prompt")
    if kind is None:
        return [Prompt(text)] * count
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="PNG")
    images = (stream.getvalue(),) * (2 if kind == "pairs" else 1)
    return [ImagePrompt(text, images=images)] * count
