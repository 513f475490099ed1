"""The contract of a backbone. Shapes: B rows, *L latent, H x W pixels."""

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""What a prompt becomes for the model: tensors by name, a row a prompt."""

BACKBONES = {
    "shapes": "flowgrain.models.shapes:ShapesBackbone",
    "sd3": "flowgrain.models.sd3:SD3Backbone",
    "flux": "flowgrain.models.flux:FluxBackbone",
    "flux2": "flowgrain.models.flux2:Flux2Backbone",
    "qwen_image": "flowgrain.models.qwen_image:QwenImageBackbone",
    "zimage": "flowgrain.models.zimage:ZImageBackbone",
}


@dataclass(frozen=True)
class Dtypes:
    """The dtypes in which a model's parts are loaded."""

    transformer: torch.dtype = torch.float32
    vae: torch.dtype = torch.float32
    encoders: torch.dtype = torch.float32


@dataclass(frozen=True)
class Source:
    """Where a model comes from and how it is set up; the fields are those of the settings, but for dtypes."""

    model: str
    weights: str | None = None
    revision: str | None = None
    height: int = 512
    width: int = 512
    max_prompt_tokens: int = 256
    t5: bool = True
    long_prompts: Literal["refuse", "cut"] = "refuse"
    embedding_cache: str | None = None
    vae_tiling: bool = False
    gradient_checkpointing: bool = False
    attention_backend: str | None = None
    dtypes: Dtypes = Dtypes()


class Backbone(Protocol):
    """A model family: encode, velocity, decode, and which layers to adapt or shard. It imports nothing of ours but this."""

    transformer: nn.Module
    """The trained part."""
    latent_shape: tuple[int, ...]
    """*L of one image."""
    lora_targets: list[str]
    """Names of the layers that take LoRA, as peft matches them."""
    lora_format: type
    """The diffusers mixin whose save_lora_weights and load_lora_weights the model's LoRA files follow."""
    blocks: list[nn.Module]
    """The repeated layers, to shard or compile one by one."""
    embedded_guidance: bool
    """Whether the model takes the guidance scale as an input, "guidance" [B] in its conditioning (FLUX), instead of true CFG."""

    def load_lora(self, path: Path) -> None:
        """Takes the adapter that a LoRA folder or file of diffusers' format holds, at full strength."""
        ...

    def natural_shift(self, num_steps: int) -> tuple[float, float | None]:
        """The timestep shift that the model's own pipeline uses at this size for a grid of `num_steps`, and the noise level to
        which it stretches the grid's last step, if it does."""
        ...

    def to(self, device: torch.device) -> None:
        """Moves every part to `device`."""
        ...

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError with the number (from 1) of the first prompt that is too long or otherwise not to be read."""
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


@runtime_checkable
class GuidesItself(Protocol):
    """A backbone whose pipeline has a formula of its own for true CFG."""

    def guide(self, v: Tensor, v_free: Tensor, guidance: float) -> Tensor:
        """The guided velocity [B, *L] of the prompts' v and the unconditional v_free, all in fp32."""
        ...


def take(cond: Conditioning, rows: Tensor) -> Conditioning:
    """The rows `rows` [B] of a conditioning."""
    return {name: value[rows] for name, value in cond.items()}


def load_backbone(source: Source) -> Backbone:
    """The backbone of `source`, with its weights. Raises ValueError naming the known ones, or the setting that is wrong."""
    if source.model not in BACKBONES:
        near = difflib.get_close_matches(source.model, BACKBONES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(BACKBONES)}"
        raise ValueError(f"model={source.model!r} is not a known backbone; {hint}")
    module, attribute = BACKBONES[source.model].split(":")
    backbone: Backbone = getattr(importlib.import_module(module), attribute).load(source)
    return backbone
