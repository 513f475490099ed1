"""Z-Image and Z-Image-Turbo: true CFG, prompts of different length side by side, time from 0 to 1. Latents [16, h, w]."""

from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from flowgrain.models.base import Conditioning
from flowgrain.models.pipeline import PipelineBackbone


class ZImageBackbone(PipelineBackbone):
    """See `Backbone`."""

    pipeline = lora_format = ZImagePipeline
    encoders = ("text_encoder", "tokenizer")
    embedded_guidance = False
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, to shard or compile one by one."""
        model = self.transformer
        return [*model.noise_refiner, *model.context_refiner, *model.layers]

    def _load_tokenizer(self) -> Any:
        return self._chat_tokenizer(thinking=True)

    def _encode(self, pipe: Any, prompt: str) -> Conditioning:
        limit = self.source.max_prompt_tokens
        return self._padded(pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=limit)[0][0])

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        embeds = cond["embeds"].to(x.dtype)
        found = transformer(
            list(x.unsqueeze(2)),  # a video of one frame each
            1 - sigma,
            [row[:length] for row, length in zip(embeds, cond["length"].tolist(), strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(found).squeeze(2)  # the model points from noise to image

    def decode(self, latents: Tensor) -> Tensor:
        return self._decode_grid(latents)
