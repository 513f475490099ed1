"""Qwen-Image: true CFG that keeps the norm of the conditional velocity, a video VAE. Latents [tokens, 64], packed 2x2."""

from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from flowgrain.models.base import Conditioning, Source
from flowgrain.models.pipeline import PipelineBackbone


class QwenImageBackbone(PipelineBackbone):
    """See `Backbone`."""

    pipeline = lora_format = QwenImagePipeline
    encoders = ("text_encoder", "tokenizer")
    embedded_guidance = False
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    def __init__(self, source: Source) -> None:
        if source.max_prompt_tokens > 1024:
            raise ValueError(f"max_prompt_tokens={source.max_prompt_tokens}: the pipeline of {source.model} reads 1024 at most")
        super().__init__(source)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.sequence_length, self.transformer.config.in_channels

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, to shard or compile one by one."""
        return list(self.transformer.transformer_blocks)

    def _load_tokenizer(self) -> Any:
        tokenizer = self._tokenizer_in("tokenizer")
        template, before = self.pipe.prompt_template_encode, self.pipe.prompt_template_encode_start_idx

        def tokenize(prompts: list[str]) -> dict[str, list[list[int]]]:
            found = tokenizer([template.format(prompt) for prompt in prompts])["input_ids"]
            return {"input_ids": [ids[before:] for ids in found]}  # the model sees nothing of the words before the prompt

        return tokenize

    def _encode(self, pipe: Any, prompt: str) -> Conditioning:
        return self._padded(pipe.encode_prompt(prompt, max_sequence_length=self.source.max_prompt_tokens)[0][0])

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        places = torch.arange(cond["embeds"].shape[1], device=x.device)
        return transformer(
            hidden_states=x,
            timestep=sigma,
            encoder_hidden_states=cond["embeds"].to(x.dtype),
            encoder_hidden_states_mask=places < cond["length"][:, None],
            img_shapes=[[(1, *self.token_grid)]] * len(x),
            return_dict=False,
        )[0]

    def guide(self, v: Tensor, v_free: Tensor, guidance: float) -> Tensor:
        """True CFG, each token [64] scaled back to the norm that it has without."""
        guided = v_free + guidance * (v - v_free)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def decode(self, latents: Tensor) -> Tensor:
        height, width = self.source.height, self.source.width
        latents = self.pipe._unpack_latents(latents.float(), height, width, self.pipe.vae_scale_factor)  # (B, 16, 1, h, w)
        mean, std = (
            torch.tensor(values, device=latents.device)[:, None, None, None]
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return self._images(latents * std + mean)[:, :, 0]
