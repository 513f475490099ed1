"""Backbone protocol, model settings and the registry of backbones.

Shapes: B rows, *L latent, H x W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import field_validator
from torch import Tensor, nn

from flowgrain.core.sde import Shift
from flowgrain.models.weights import WeightFiles
from flowgrain.registry import Registry
from flowgrain.settings import Section, Setting

Conditioning = dict[str, Tensor]
"""Encoded prompts: named tensors with one row per prompt."""

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """Settings of the section `model`: which backbone to use, its weights and the image size.

    The bundled model `shapes` only uses `name` and `path`. Its images always have 32 x 32
    pixels, and it is always loaded in float32.

    Example:
        >>> ModelConfig(name="flux", path="black-forest-labs/FLUX.1-dev", height=720, width=720)
    """

    name: str = Setting(
        "shapes",
        "Backbone: shapes (bundled), sd3 (SD3 and SD3.5), flux (FLUX.1), flux2 (FLUX.2-klein), "
        "qwen_image, zimage, or a backbone from a plugin.",
        keep=True,
    )
    path: str | None = Setting(
        None,
        "Directory or Hugging Face Hub name of a diffusers pipeline. The shapes model needs none.",
        keep=True,
    )
    revision: str | None = Setting(
        None, "Branch, tag or commit of the Hub repository. Default: its main branch.", keep=True
    )
    height: int = Setting(512, "Image height.", unit="pixels", keep=True, ge=8, le=32_768)
    width: int = Setting(512, "Image width.", unit="pixels", keep=True, ge=8, le=32_768)
    max_prompt_tokens: int = Setting(
        256, "Sequence length of encoded prompts.", unit="tokens", keep=True, ge=1, le=8192
    )
    t5: bool = Setting(
        True,
        "SD3 only: also encode prompts with T5. Without T5 a prompt has at most 77 tokens.",
        keep=True,
    )
    long_prompts: Literal["error", "truncate"] = Setting(
        "error", "What to do with prompts that have too many tokens: raise an error, or truncate."
    )
    embedding_cache: str | None = Setting(
        None, "Directory in which prompt embeddings are stored for later runs. Default: none."
    )
    vae_tiling: bool = Setting(False, "Decode images in tiles, which saves memory.")
    gradient_checkpointing: bool = Setting(
        False, "Recompute activations in the backward pass, which saves memory and costs time."
    )
    attention_backend: str | None = Setting(
        None,
        "Attention backend of diffusers, such as native or flash. Default: selected by diffusers.",
    )
    vae_dtype: Literal["auto", "float32", "bfloat16"] = Setting(
        "auto", "Dtype of the VAE. auto: float32.", keep=True
    )
    encoder_dtype: DtypeName = Setting(
        "auto",
        "Dtype of the text encoders. auto: bfloat16 on a GPU, float32 on a CPU.",
        keep=True,
    )
    keep_encoders: bool = Setting(
        False,
        "Keep the text encoders in memory, instead of until all prompts of the run are encoded.",
    )

    @field_validator("name")
    @classmethod
    def _registered_spelling(cls, name: str) -> str:
        """The registered spelling: Qwen-Image becomes qwen_image. Unknown names are kept."""
        return BACKBONES.find(name) or name


@dataclass(frozen=True)
class Dtypes:
    """Dtypes in which the parts of a model are loaded."""

    transformer: torch.dtype = torch.float32
    vae: torch.dtype = torch.float32
    encoders: torch.dtype = torch.float32


class LoraFormat(Protocol):
    """A LoRA file format: a LoRA loader mixin of diffusers, or a pipeline class with this mixin."""

    def save_lora_weights(
        self,
        save_directory: Path,
        *,
        transformer_lora_layers: Mapping[str, Tensor],
        transformer_lora_adapter_metadata: Mapping[str, Any],
    ) -> None:
        """Write the LoRA tensors and their metadata to a directory."""

    def lora_state_dict(self, path: Path) -> Mapping[str, Tensor]:
        """Return the tensors of a LoRA directory or file by name."""


class NoLora:
    """The `lora_format` of a backbone without LoRA support. Every use raises ValueError."""

    _MESSAGE = "this backbone does not support LoRA. Use lora.rank=0"

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: Path,  # noqa: ARG003
        *,
        transformer_lora_layers: Mapping[str, Tensor],  # noqa: ARG003
        transformer_lora_adapter_metadata: Mapping[str, Any],  # noqa: ARG003
    ) -> None:
        """Raise ValueError."""
        raise ValueError(cls._MESSAGE)

    @classmethod
    def lora_state_dict(cls, path: Path) -> Mapping[str, Tensor]:
        """Raise ValueError."""
        raise ValueError(f"{path}: {cls._MESSAGE}")


class Backbone(Protocol):
    """A model family: encode prompts, predict velocities, decode latents.

    A backbone also lists the layers that take LoRA and the layers that are sharded. An
    implementation only needs to import this module.
    """

    @property
    def transformer(self) -> nn.Module:
        """The trained model. It needs `save_pretrained(directory)` for the export."""

    @property
    def vae(self) -> nn.Module | None:
        """The image decoder, for memory estimates. None if no module decodes the latents."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape *L of the latent of one image."""

    @property
    def lora_targets(self) -> list[str]:
        """Names of the layers that take LoRA by default. Empty: no LoRA.

        A name selects all layers whose full name is it, or ends with a dot and it, as in
        `target_modules` of peft.
        """

    @property
    def lora_format(self) -> LoraFormat:
        """File format of the LoRA weights. `NoLora` if the backbone does not support LoRA."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers of `transformer`. They are sharded and compiled one by one."""

    @property
    def embedded_guidance(self) -> bool:
        """Whether the transformer takes the guidance scale as an input (FLUX.1-dev).

        If True, the conditioning contains "guidance" [B]. If False, guidance is classifier-free
        guidance: two forward passes per row.
        """

    def load_lora(self, path: Path) -> None:
        """Load the LoRA weights of a directory or file into `transformer`, with scale 1."""

    def natural_shift(self, num_steps: int) -> Shift:
        """Return the noise grid that the model's own pipeline uses at this image size.

        `sigma_grid(num_steps, *shift)` is this grid. A plain tuple (shift, terminal) also works.

        Args:
            num_steps: number of sampling steps.
        """

    def to(self, device: torch.device) -> None:
        """Move all parts to `device`."""

    def check(self, texts: Sequence[str]) -> None:
        """Check that all `texts` can be encoded.

        Raises:
            ValueError: a text cannot be read or is too long. The message starts with its number,
                counted from 1.
        """

    def bundled_prompts(self, split: str) -> list[str]:
        """Return the prompts of `split` that come with the model. Empty if there are none.

        Args:
            split: "train", "validation" or "held-out".
        """

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Return the conditioning of `texts`, one row each. "" is the unconditional prompt.

        Raises:
            ValueError: a text cannot be read.
        """

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Return the velocity v [B, *L], in the dtype of `x`.

        Args:
            transformer: `self.transformer`, or a copy of it.
            x: latents [B, *L].
            sigma: noise levels [B] in 0..1, float32.
            cond: conditioning with B rows.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in 0..1, float32, of clean latents [B, *L].

        Methods that train on the gradient of a reward need images with a graph if `latents`
        require a gradient.
        """


@runtime_checkable
class CustomGuidance(Protocol):
    """A backbone with its own formula for classifier-free guidance."""

    def guide(self, v: Tensor, v_free: Tensor, guidance: float) -> Tensor:
        """Return the guided velocity [B, *L], float32.

        Args:
            v: velocity with the prompt [B, *L], float32.
            v_free: velocity without the prompt [B, *L], float32.
            guidance: guidance scale.
        """


@runtime_checkable
class ImageEncoder(Protocol):
    """A backbone that encodes images, which training on a data set of images needs."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the clean latents [I, *L], float32, of images [I, 3, H, W] in 0..1.

        This is the inverse of `decode`, up to the loss of the VAE.
        """


@runtime_checkable
class EmptyBackbone(Protocol):
    """A backbone whose transformer may be empty: its parameters are on the meta device.

    A registered backbone with a class method `load_empty(model, dtypes)` returns such a backbone
    for training. Copies and shards of the transformer are then made without memory, and filled
    from the files of the weights. `load` of this class returns the same backbone with weights.

    Attributes:
        weights: files of the weights. None if the transformer has its weights.
    """

    weights: WeightFiles | None


def take(cond: Conditioning, rows: Tensor) -> Conditioning:
    """Return the rows `rows` [B] of a conditioning."""
    return {name: value[rows] for name, value in cond.items()}


class BackboneLoader(Protocol):
    """A registered backbone: a class with a class method `load`."""

    def load(self, model: ModelConfig, dtypes: Dtypes) -> Backbone:
        """Return a backbone with its weights.

        Raises:
            ValueError: a setting cannot be used. The message names it.
        """


BACKBONES: Registry[BackboneLoader] = Registry(
    "backbone",
    "flowgrain.backbones",
    {
        "shapes": "flowgrain.models.shapes:ShapesBackbone",
        "sd3": "flowgrain.models.sd3:SD3Backbone",
        "flux": "flowgrain.models.flux:FluxBackbone",
        "flux2": "flowgrain.models.flux2:Flux2Backbone",
        "qwen_image": "flowgrain.models.qwen_image:QwenImageBackbone",
        "zimage": "flowgrain.models.zimage:ZImageBackbone",
    },
)
"""All backbones by name. Other packages add theirs by the entry-point group flowgrain.backbones."""

C = TypeVar("C", bound=BackboneLoader)


def register_backbone(name: str) -> Callable[[C], C]:
    """Class decorator that adds a backbone to `BACKBONES` under `name`.

    Example:
        >>> @register_backbone("mine")
        ... class MyBackbone:
        ...     @classmethod
        ...     def load(cls, model: ModelConfig, dtypes: Dtypes) -> "MyBackbone": ...

    Raises:
        SettingsError: another backbone has this name.
    """

    def register(backbone_class: C) -> C:
        BACKBONES.register(name)(backbone_class)
        return backbone_class

    return register
