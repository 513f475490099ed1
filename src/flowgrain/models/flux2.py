"""FLUX.2-klein: a language model as text encoder, batch-normalized latents. Latents [128, h, w]."""

from typing import Any

from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from flowgrain.models.base import Conditioning
from flowgrain.models.encoding import modes
from flowgrain.models.pipeline import JOINT_ATTENTION, PipelineBackbone
from flowgrain.models.tokens import chat_token_counts


class Flux2Backbone(PipelineBackbone):
    """`Backbone` of FLUX.2-klein, with classifier-free guidance."""

    pipeline = Flux2KleinPipeline
    encoders = ("text_encoder", "tokenizer")

    @property
    def lora_targets(self) -> list[str]:
        """Attention layers of the double blocks, and both layers of the single blocks."""
        # By full name, because "to_out" alone also matches the ModuleLists of the double blocks.
        count = len(self.transformer.single_transformer_blocks)
        single = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(count)]
        return [*JOINT_ATTENTION, "to_qkv_mlp_proj", *single]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape [128, h, w] of latents packed 2 x 2."""
        return self.transformer.config.in_channels, *self.token_grid

    @property
    def blocks(self) -> list[nn.Module]:
        """The double blocks and the single blocks of the transformer."""
        model = self.transformer
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def _mu(self, num_steps: int) -> float:
        mu: float = compute_empirical_mu(self.sequence_length, num_steps)
        return mu

    def _token_counts(self, texts: list[str]) -> list[int]:
        return chat_token_counts(self._tokenizer, texts, thinking=False)

    def _encode(self, pipe: Any, text: str) -> Conditioning:
        limit = self.config.max_prompt_tokens
        return {"embeds": pipe.encode_prompt(text, max_sequence_length=limit)[0]}

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Return the velocity v [B, 128, h, w]."""
        packed: Tensor = transformer(
            hidden_states=self.pipe._pack_latents(x),
            timestep=sigma,
            encoder_hidden_states=cond["embeds"].to(x.dtype),
            txt_ids=self.pipe._prepare_text_ids(cond["embeds"][:1]).to(x.device),
            img_ids=self.pipe._prepare_latent_ids(x[:1]).to(x.device),
            return_dict=False,
        )[0]  # (B, tokens, 128)
        return packed.mT.reshape(x.shape)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [I, 128, h, w] of images [I, 3, H, W] in 0..1."""
        std, mean = self._statistics()
        packed: Tensor = self.pipe._patchify_latents(modes(self.vae, images))
        return (packed - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in 0..1 of latents [B, 128, h, w]."""
        std, mean = self._statistics()
        return self._images(self.pipe._unpatchify_latents(latents.float() * std + mean))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Standard deviations and means [128, 1, 1] of the packed latents of the VAE."""
        norm = self.vae.bn
        std = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        return std[:, None, None], norm.running_mean.float()[:, None, None]
