"""The bundled backbone: a small SD3 transformer over the latents of a small autoencoder, for 32x32 scenes of shapes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from diffusers.loaders import SD3LoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowgrain.models.base import Conditioning, Source
from flowgrain.shapes import grammar
from flowgrain.shapes.grammar import MAX_WORDS, VOCABULARY, tokenize

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"
WIDTH = 64
BUNDLED = Source("shapes")


class WordTable(nn.Module):
    """Words and places embedded by a table: tokens [B, MAX_WORDS] -> [B, MAX_WORDS, WIDTH]. Stands where SD3 has text encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(len(VOCABULARY), WIDTH)
        self.place = nn.Embedding(MAX_WORDS, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.place.weight


def build_transformer() -> SD3Transformer2DModel:
    """The transformer's architecture with fresh weights: 16 latent patches and 6 words, 4 joint blocks of width 96."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=3,
        attention_head_dim=32,
        joint_attention_dim=WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=4,
    )


class ShapesBackbone:
    """See `Backbone`. Latents are [4, 8, 8], images 32x32."""

    latent_shape = (4, 8, 8)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    lora_format = SD3LoraLoaderMixin
    embedded_guidance = False

    def __init__(self, transformer: SD3Transformer2DModel, words: WordTable, vae: AutoencoderTiny) -> None:
        self.transformer = transformer
        self.words = words.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @classmethod
    def load(cls, source: Source = BUNDLED) -> "ShapesBackbone":
        """The bundled weights, or those of another folder with the same three parts."""
        folder = Path(source.weights) if source.weights else WEIGHTS
        if not (folder / "words.safetensors").exists():
            raise ValueError(f"weights={folder}: there is no words.safetensors; leave it out for the bundled model")
        words = WordTable()
        words.load_state_dict(load_file(folder / "words.safetensors"))
        transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
        return cls(transformer, words, AutoencoderTiny.from_pretrained(folder / "vae"))

    def save(self, folder: Path) -> None:
        """Writes what `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.words.state_dict(), folder / "words.safetensors")
        self.transformer.save_pretrained(folder / "transformer")
        self.vae.save_pretrained(folder / "vae")

    def to(self, device: torch.device) -> None:
        for part in (self.transformer, self.words, self.vae):
            part.to(device)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, to shard or compile one by one."""
        return list(self.transformer.transformer_blocks)

    def load_lora(self, path: Path) -> None:
        state, metadata = self.lora_format.lora_state_dict(path, return_lora_metadata=True)
        self.lora_format.load_lora_into_transformer(state, self.transformer, metadata=metadata)

    def natural_shift(self, num_steps: int) -> tuple[float, float | None]:  # noqa: ARG002
        return 3.0, None

    def check(self, prompts: Sequence[str]) -> None:
        for number, prompt in enumerate(prompts, 1):
            try:
                tokenize(prompt)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None

    def bundled_prompts(self, split: str) -> list[str]:
        return list(grammar.prompts(split))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        tokens = torch.tensor([tokenize(prompt) if prompt else [0] * MAX_WORDS for prompt in prompts])
        words = self.words(tokens.to(self.words.place.weight.device))
        return {"words": words, "pooled": words.mean(1)}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return transformer(
            hidden_states=x,
            encoder_hidden_states=cond["words"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            timestep=1000 * sigma,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        scale, shift = self.vae.config["scaling_factor"], self.vae.config["shift_factor"]
        latents = (latents.float() / scale + shift).contiguous(memory_format=torch.channels_last)
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
