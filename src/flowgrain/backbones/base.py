"""The contract of a backbone. Shapes: B rows, *L latent, H x W pixels."""

import importlib
from typing import Protocol

import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""What a prompt becomes for the model: tensors by name, a row a prompt."""

BACKBONES = {"shapes": "flowgrain.backbones.shapes:ShapesBackbone"}


class Backbone(Protocol):
    """A model family: encode, velocity, decode, and which layers to adapt or shard. It imports nothing of ours but this."""

    transformer: nn.Module
    """The trained part."""
    latent_shape: tuple[int, ...]
    """*L of one image."""
    lora_targets: list[str]
    """Names of the layers that take LoRA, as peft matches them."""
    embedded_guidance: bool
    """Whether the model takes the guidance scale as an input, "guidance" [B] in its conditioning (FLUX), instead of true CFG."""

    def to(self, device: torch.device) -> None:
        """Moves every part to `device`."""
        ...

    def check(self, prompt: str) -> None:
        """Raises ValueError, saying what it can read, for a prompt that is too long or otherwise not to be read."""
        ...

    def bundled_prompts(self, split: str) -> list[str]:
        """The model's own prompts of `split` ("train", "validation" or "held-out"); empty for a model that brings none."""
        ...

    def encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of `prompts`, a row each; "" is the unconditional one. Raises ValueError for one it cannot read."""
        ...

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """v [B, *L] at x [B, *L] and noise level sigma [B] in fp32, in x's dtype."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1, fp32, of clean latents [B, *L]."""
        ...


def take(cond: Conditioning, rows: Tensor) -> Conditioning:
    """The rows `rows` [B] of a conditioning."""
    return {name: value[rows] for name, value in cond.items()}


def load_backbone(name: str) -> Backbone:
    """The backbone `name`, with its weights. Raises ValueError naming the known ones."""
    if name not in BACKBONES:
        raise ValueError(f"model={name!r} is not a known backbone; known: {', '.join(BACKBONES)}")
    module, attribute = BACKBONES[name].split(":")
    backbone: Backbone = getattr(importlib.import_module(module), attribute).load()
    return backbone
