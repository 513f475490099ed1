"""Z-Image and Z-Image-Turbo: prompts keep their own lengths in a batch. Latents [16, h, w]."""

from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from flowgrain.models.base import Conditioning
from flowgrain.models.encoding import encode_grid
from flowgrain.models.pipeline import PipelineBackbone
from flowgrain.models.tokens import chat_token_counts, pad


class ZImageBackbone(PipelineBackbone):
    """`Backbone` of Z-Image, with classifier-free guidance."""

    pipeline = ZImagePipeline
    encoders = ("text_encoder", "tokenizer")
    lora_targets: ClassVar[list[str]] = ["to_q", "to_k", "to_v", "to_out.0"]

    @property
    def blocks(self) -> list[nn.Module]:
        """The refiner blocks and the joint blocks of the transformer."""
        model = self.transformer
        return [*model.noise_refiner, *model.context_refiner, *model.layers]

    def _token_counts(self, texts: list[str]) -> list[int]:
        return chat_token_counts(self._tokenizer, texts, thinking=True)

    def _encode(self, pipe: Any, text: str) -> Conditioning:
        limit = self.config.max_prompt_tokens
        embeds = pipe.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=limit
        )
        return pad(embeds[0][0], limit)

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Return the velocity v [B, 16, h, w]."""
        embeds = cond["embeds"].to(x.dtype)
        lengths = cond["length"].tolist()
        outputs = transformer(
            list(x.unsqueeze(2)),  # videos of one frame
            1 - sigma,  # the model's time runs from noise (0) to image (1)
            [row[:length] for row, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(outputs).squeeze(2)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [I, 16, h, w] of images [I, 3, H, W] in 0..1."""
        return encode_grid(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in 0..1 of latents [B, 16, h, w]."""
        return self._decode_grid(latents)
