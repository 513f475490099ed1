"""FLUX.1-dev and FLUX.1-schnell: latents packed 2 x 2 into tokens. Latents [tokens, 64]."""

from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from flowgrain.models.base import Conditioning
from flowgrain.models.encoding import encode_grid, pack
from flowgrain.models.pipeline import JOINT_ATTENTION, PipelineBackbone


class FluxBackbone(PipelineBackbone):
    """`Backbone` of FLUX.1. FLUX.1-dev takes the guidance scale as an input of the transformer."""

    pipeline = FluxPipeline
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    lora_targets: ClassVar[list[str]] = JOINT_ATTENTION

    @property
    def embedded_guidance(self) -> bool:
        """True for FLUX.1-dev, False for FLUX.1-schnell."""
        return bool(self.transformer.config.guidance_embeds)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape [tokens, 64] of packed latents."""
        return self.sequence_length, self.transformer.config.in_channels

    @property
    def blocks(self) -> list[nn.Module]:
        """The double blocks and the single blocks of the transformer."""
        model = self.transformer
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    @property
    def _tokenizer_name(self) -> str:
        return "tokenizer_2"

    def _encode(self, pipe: Any, text: str) -> Conditioning:
        limit = self.config.max_prompt_tokens
        embeds, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=limit)
        return {"embeds": embeds, "pooled": pooled}

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Return the velocity v [B, tokens, 64]."""
        image_ids = self.pipe._prepare_latent_image_ids(1, *self.token_grid, x.device, x.dtype)
        v: Tensor = transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=cond.get("guidance"),
            encoder_hidden_states=cond["embeds"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            txt_ids=torch.zeros(cond["embeds"].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return v

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [I, tokens, 64] of images [I, 3, H, W] in 0..1."""
        return pack(encode_grid(self.vae, images))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in 0..1 of latents [B, tokens, 64]."""
        size = self.config.height, self.config.width
        return self._decode_grid(
            self.pipe._unpack_latents(latents, *size, self.pipe.vae_scale_factor)
        )
