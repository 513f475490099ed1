"""FLUX.2-klein: true CFG, one language model as text encoder, batch-normalised latents. Latents [128, h, w], packed 2x2."""

from typing import Any

from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from flowgrain.models.base import Conditioning
from flowgrain.models.pipeline import PipelineBackbone


class Flux2Backbone(PipelineBackbone):
    """See `Backbone`."""

    pipeline = lora_format = Flux2KleinPipeline
    encoders = ("text_encoder", "tokenizer")
    embedded_guidance = False

    @property
    def lora_targets(self) -> list[str]:
        single = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(len(self.transformer.single_transformer_blocks))]
        double = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        return [*double, "to_qkv_mlp_proj", *single]  # a bare "to_out" would match the double blocks' lists of layers too

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.transformer.config.in_channels, *self.token_grid

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, to shard or compile one by one."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def _mu(self, num_steps: int) -> float:
        return compute_empirical_mu(self.sequence_length, num_steps)

    def _load_tokenizer(self) -> Any:
        return self._chat_tokenizer(thinking=False)

    def _encode(self, pipe: Any, prompt: str) -> Conditioning:
        return {"embeds": pipe.encode_prompt(prompt, max_sequence_length=self.source.max_prompt_tokens)[0]}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        packed = transformer(
            hidden_states=self.pipe._pack_latents(x),
            timestep=sigma,
            encoder_hidden_states=cond["embeds"].to(x.dtype),
            txt_ids=self.pipe._prepare_text_ids(cond["embeds"][:1])[0].to(x.device),
            img_ids=self.pipe._prepare_latent_ids(x[:1])[0].to(x.device),
            return_dict=False,
        )[0]  # (B, tokens, 128)
        return packed.mT.reshape(x.shape)

    def decode(self, latents: Tensor) -> Tensor:
        norm = self.vae.bn
        std = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        latents = latents.float() * std[:, None, None] + norm.running_mean.float()[:, None, None]
        return self._images(self.pipe._unpatchify_latents(latents))
