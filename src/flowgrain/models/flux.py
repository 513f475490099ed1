"""FLUX.1-dev and -schnell: guidance as an input where the model takes one, latents packed 2x2. Latents [tokens, 64]."""

from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from flowgrain.models.base import Conditioning
from flowgrain.models.pipeline import PipelineBackbone


class FluxBackbone(PipelineBackbone):
    """See `Backbone`."""

    pipeline = lora_format = FluxPipeline
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    @property
    def embedded_guidance(self) -> bool:
        return bool(self.transformer.config.guidance_embeds)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.sequence_length, self.transformer.config.in_channels

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, to shard or compile one by one."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def _load_tokenizer(self) -> Any:
        return self._tokenizer_in("tokenizer_2")

    def _encode(self, pipe: Any, prompt: str) -> Conditioning:
        embeds, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=self.source.max_prompt_tokens)
        return {"embeds": embeds, "pooled": pooled}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        image_ids = self.pipe._prepare_latent_image_ids(1, *self.token_grid, x.device, x.dtype)
        return transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=cond.get("guidance"),
            encoder_hidden_states=cond["embeds"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            txt_ids=torch.zeros(cond["embeds"].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        unpacked = self.pipe._unpack_latents(latents, self.source.height, self.source.width, self.pipe.vae_scale_factor)
        return self._decode_grid(unpacked)
