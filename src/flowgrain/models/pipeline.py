"""Base class of the backbones that are built on diffusers pipelines.

Shapes: B rows, *L latent, H x W pixels.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flowgrain.core.sde import Shift
from flowgrain.models.base import Conditioning, Dtypes, ModelConfig
from flowgrain.models.loading import (
    apply_options,
    check_size,
    empty_transformer,
    load_pipeline,
    open_cache,
    saved_parts,
)
from flowgrain.models.prompt_encoding import PromptEncoding
from flowgrain.models.shift import linear_mu, scheduler_shift
from flowgrain.models.weights import WeightFiles, fill
from flowgrain.settings import SettingsError

JOINT_ATTENTION = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]
"""Joint attention layers, for image and text tokens. The second attention of SD3.5-medium, `attn2`,
only sees image tokens and is not included. On SD3.5-medium these are the 191 layers of Flow-GRPO.
"""


class PipelineBackbone(PromptEncoding):
    """A `Backbone` that loads the transformer, VAE and scheduler of a diffusers pipeline.

    The text encoders are loaded on the first prompt that the embedding cache does not contain, and
    freed when no prompt of the run needs them, unless model.keep_encoders is set.

    Attributes:
        weights: files of the weights of the transformer, while it is empty. None if it has weights.
    """

    pipeline: ClassVar[Any]
    """The pipeline class."""

    def __init__(self, model: ModelConfig, dtypes: Dtypes) -> None:
        """Load the VAE, and build the transformer without its weights. `load` also fills it.

        Raises:
            SettingsError: `model.path` is missing or holds another model, or another setting
                cannot be used.
        """
        if not model.path:
            raise SettingsError(
                f"model.path: model.name={model.name} needs weights. "
                "Set model.path to the directory or Hub name of a diffusers pipeline."
            )
        self.config, self.dtypes = model, dtypes
        self.weights: WeightFiles | None = None
        self.pipe = self._load_pipeline(dict.fromkeys(self.encoders))
        self.transformer: Any = self.pipe.transformer
        self.vae: Any = self.pipe.vae.requires_grad_(False).eval()
        check_size(model, self._token_side)
        apply_options(model, self.transformer, self.vae)
        self.device = torch.device("cpu")
        self.init_encoding(open_cache(model, dtypes.encoders))

    @classmethod
    def load(cls, model: ModelConfig, dtypes: Dtypes) -> Self:
        """Return the backbone with its weights.

        Raises:
            SettingsError: a setting cannot be used.
        """
        backbone = cls.load_empty(model, dtypes)
        if backbone.weights is not None:
            fill([(backbone.transformer, True)], backbone.weights, torch.device("cpu"))
            backbone.weights = None
        return backbone

    @classmethod
    def load_empty(cls, model: ModelConfig, dtypes: Dtypes) -> Self:
        """Return the backbone without the weights of the transformer. See `EmptyBackbone`.

        Raises:
            SettingsError: a setting cannot be used, or a file is missing or damaged.
        """
        return cls(model, dtypes)

    def _encoding_parts(self) -> dict[str, Any]:
        """The parts that a pipeline for encoding shares with this backbone."""
        return {"transformer": self.transformer, "vae": self.vae}

    def _load_pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Load the pipeline. `parts` are used as they are and not loaded."""
        parts = {**dict.fromkeys(self._absent_parts), **parts}
        if "transformer" not in parts:
            found = empty_transformer(self.config, self.dtypes.transformer)
            if found is not None:
                parts["transformer"], self.weights = found
        return load_pipeline(self.pipeline, self.config, self.dtypes, parts)

    @cached_property
    def _absent_parts(self) -> list[str]:
        """Parts of `encoders` that the saved pipeline does not contain."""
        saved = saved_parts(self.pipeline, self.config)
        return [name for name in self.encoders if name not in saved]

    def to(self, device: torch.device) -> None:
        """Move all loaded parts to `device`. Parts that are loaded later are also moved there."""
        self.device = device
        for part in (self.transformer, self.vae):
            part.to(device)
        self._move_encoders()

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated layers of the transformer."""

    @property
    @abstractmethod
    def lora_targets(self) -> list[str]:
        """Names of the layers that take LoRA by default."""

    @property
    def lora_format(self) -> Any:
        """The pipeline class, which reads and writes LoRA files."""
        return self.pipeline

    def load_lora(self, path: Path) -> None:
        """Load the LoRA weights of a directory or file into the transformer, with scale 1."""
        self.pipe.load_lora_weights(path)

    @property
    def embedded_guidance(self) -> bool:
        """False: guidance is classifier-free guidance."""
        return False

    @property
    def _token_side(self) -> int:
        """Side of an image token in pixels. 2 x 2 latents are one token in all these models."""
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.config.height // self._token_side, self.config.width // self._token_side

    @property
    def sequence_length(self) -> int:
        """Number of image tokens. Pipelines compute the timestep shift from it."""
        return math.prod(self.token_grid)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape [C, h, w] of the VAE's latents. Models with packed latents override it."""
        scale = self.pipe.vae_scale_factor
        height, width = self.config.height // scale, self.config.width // scale
        return self.transformer.config.in_channels, height, width

    def natural_shift(self, num_steps: int) -> Shift:
        """Return the noise grid of the pipeline, if it is called without `sigmas`."""
        return scheduler_shift(self.pipe.scheduler.config, self._mu(num_steps))

    def _mu(self, num_steps: int) -> float:  # noqa: ARG002
        """Parameter of the scheduler's dynamic shift."""
        return linear_mu(self.pipe.scheduler.config, self.sequence_length)

    def bundled_prompts(self, split: str) -> list[str]:  # noqa: ARG002
        """Return an empty list: the published models come without prompts."""
        return []

    @abstractmethod
    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Return the velocity v [B, *L] at `x` [B, *L] and noise levels `sigma` [B]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in 0..1 of clean latents [B, *L]."""

    def _decode_grid(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] of latents [B, C, h, w], scaled and shifted by the VAE's config."""
        config = self.vae.config
        scaled = latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0)
        return self._images(scaled)

    def _images(self, latents: Tensor) -> Tensor:
        """Images in 0..1, float32, of latents that are already scaled for the VAE.

        Values outside of 0..1 are clamped and have no gradient, as in ReFL's published code.
        """
        decoded: Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)
