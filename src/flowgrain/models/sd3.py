"""Stable Diffusion 3 and 3.5: three text encoders, of which T5 is optional. Latents [16, h, w]."""

from typing import Any, ClassVar

from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from flowgrain.core.sde import Shift
from flowgrain.models.base import Conditioning
from flowgrain.models.encoding import encode_grid
from flowgrain.models.pipeline import JOINT_ATTENTION, PipelineBackbone

_CLIP_TOKENS = 77
_T5 = ("text_encoder_3", "tokenizer_3")


class SD3Backbone(PipelineBackbone):
    """`Backbone` of SD3 and SD3.5, with classifier-free guidance."""

    pipeline = StableDiffusion3Pipeline
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *_T5)
    lora_targets: ClassVar[list[str]] = JOINT_ATTENTION

    @property
    def blocks(self) -> list[nn.Module]:
        """The joint blocks of the transformer."""
        return list(self.transformer.transformer_blocks)

    @property
    def _absent_parts(self) -> list[str]:
        return [*super()._absent_parts, *(() if self.config.t5 else _T5)]

    @property
    def _has_t5(self) -> bool:
        return "text_encoder_3" not in self._absent_parts

    @property
    def _tokenizer_name(self) -> str:
        return "tokenizer_3" if self._has_t5 else "tokenizer"

    @property
    def _encoder_limit(self) -> int | None:
        return None if self._has_t5 else _CLIP_TOKENS

    def natural_shift(self, num_steps: int) -> Shift:
        """Return the noise grid of the pipeline, if it is called without `sigmas`.

        The pipeline gives no levels to its scheduler. They end at the scheduler's lowest level,
        1/1000 after the shift, and are shifted again: at shift 3, the last step starts at .0089.
        """
        lowest = float(self.pipe.scheduler.sigma_min)
        return super().natural_shift(num_steps)._replace(sigma_min=lowest)

    def _encode(self, pipe: Any, text: str) -> Conditioning:
        embeds, _, pooled, _ = pipe.encode_prompt(
            text,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_prompt_tokens,
        )
        return {"embeds": embeds, "pooled": pooled}

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Return the velocity v [B, 16, h, w]."""
        v: Tensor = transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=cond["embeds"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            return_dict=False,
        )[0]
        return v

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [I, 16, h, w] of images [I, 3, H, W] in 0..1."""
        return encode_grid(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in 0..1 of latents [B, 16, h, w]."""
        return self._decode_grid(latents)
