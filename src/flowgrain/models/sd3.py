"""Stable Diffusion 3 and 3.5: true CFG, up to three text encoders. Latents [16, h, w]."""

from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from flowgrain.models.base import Conditioning
from flowgrain.models.pipeline import PipelineBackbone


class SD3Backbone(PipelineBackbone):
    """See `Backbone`."""

    pipeline = lora_format = StableDiffusion3Pipeline
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    embedded_guidance = False
    # The layers that Flow-GRPO adapts.
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, to shard or compile one by one."""
        return list(self.transformer.transformer_blocks)

    def _load_tokenizer(self) -> Any:
        if self.source.t5:
            try:
                return self._tokenizer_in("tokenizer_3")
            except (OSError, ValueError):
                pass  # T5 is optional
        self._most_tokens = 77  # CLIP's, which are then all there is
        return self._tokenizer_in("tokenizer")

    def _encode(self, pipe: Any, prompt: str) -> Conditioning:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=self.source.max_prompt_tokens
        )
        return {"embeds": embeds, "pooled": pooled}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=cond["embeds"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        return self._decode_grid(latents)
