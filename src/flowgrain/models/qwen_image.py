"""Qwen-Image: a video VAE, latents packed 2 x 2 into tokens. Latents [tokens, 64]."""

from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from flowgrain.models.base import Conditioning, Dtypes, ModelConfig
from flowgrain.models.encoding import modes, pack
from flowgrain.models.pipeline import JOINT_ATTENTION, PipelineBackbone
from flowgrain.models.tokens import pad
from flowgrain.settings import SettingsError

_MAX_PROMPT_TOKENS = 1024


class QwenImageBackbone(PipelineBackbone):
    """`Backbone` of Qwen-Image, with classifier-free guidance that keeps the velocity's norm."""

    pipeline = QwenImagePipeline
    encoders = ("text_encoder", "tokenizer")
    lora_targets: ClassVar[list[str]] = JOINT_ATTENTION

    def __init__(self, model: ModelConfig, dtypes: Dtypes) -> None:
        """Load the transformer and the VAE.

        Raises:
            SettingsError: a setting cannot be used.
        """
        if model.max_prompt_tokens > _MAX_PROMPT_TOKENS:
            raise SettingsError(
                f"model.max_prompt_tokens={model.max_prompt_tokens}: the maximum of "
                f"model.name={model.name} is {_MAX_PROMPT_TOKENS}."
            )
        super().__init__(model, dtypes)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape [tokens, 64] of packed latents."""
        return self.sequence_length, self.transformer.config.in_channels

    @property
    def blocks(self) -> list[nn.Module]:
        """The joint blocks of the transformer."""
        return list(self.transformer.transformer_blocks)

    def _token_counts(self, texts: list[str]) -> list[int]:
        # The pipeline removes the tokens of the system prompt after encoding.
        template, start = (
            self.pipe.prompt_template_encode,
            self.pipe.prompt_template_encode_start_idx,
        )
        counts = super()._token_counts([template.format(text) for text in texts])
        return [max(count - start, 0) for count in counts]

    def _encode(self, pipe: Any, text: str) -> Conditioning:
        limit = self.config.max_prompt_tokens
        return pad(pipe.encode_prompt(text, max_sequence_length=limit)[0][0], limit)

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Return the velocity v [B, tokens, 64]."""
        positions = torch.arange(cond["embeds"].shape[1], device=x.device)
        v: Tensor = transformer(
            hidden_states=x,
            timestep=sigma,
            encoder_hidden_states=cond["embeds"].to(x.dtype),
            encoder_hidden_states_mask=positions < cond["length"][:, None],
            img_shapes=[[(1, *self.token_grid)]] * len(x),
            return_dict=False,
        )[0]
        return v

    def guide(self, v: Tensor, v_free: Tensor, guidance: float) -> Tensor:
        """Return the guided velocity, where each token [64] is rescaled to its norm in `v`."""
        guided = v_free + guidance * (v - v_free)
        rescaled: Tensor = guided * (
            v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        )
        return rescaled

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [I, tokens, 64] of images [I, 3, H, W] in 0..1."""
        mean, std = self._statistics(images.device)
        found = modes(self.vae, images[:, :, None])  # (I, C, frames = 1, h, w)
        return pack(((found - mean) / std)[:, :, 0])

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in 0..1 of latents [B, tokens, 64]."""
        size = self.config.height, self.config.width
        unpacked = self.pipe._unpack_latents(latents.float(), *size, self.pipe.vae_scale_factor)
        mean, std = self._statistics(latents.device)
        return self._images(unpacked * std + mean)[:, :, 0]  # (B, 3, frames = 1, H, W)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Means and standard deviations [16, 1, 1, 1] of the latents of the VAE."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values, device=device)[:, None, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
