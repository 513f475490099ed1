"""The bundled backbone: a small SD3 transformer and a small autoencoder for scenes of shapes.

Shapes: B rows. Latents are [4, 8, 8], images [3, 32, 32].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from diffusers.loaders.lora_pipeline import SD3LoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowgrain.core.sde import Shift
from flowgrain.models.base import Conditioning, Dtypes, ModelConfig
from flowgrain.settings import SettingsError
from flowgrain.shapes import grammar
from flowgrain.shapes.grammar import MAX_WORDS, VOCABULARY, tokenize

# diffusers has no type annotations.
_Transformer: Any = SD3Transformer2DModel
_Autoencoder: Any = AutoencoderTiny

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"
BUNDLED = ModelConfig(name="shapes")
WIDTH = 64
"""Width of a word embedding."""


class WordTable(nn.Module):
    """Word and position embeddings. They replace the text encoders of SD3."""

    # The names of these layers are the keys of words.safetensors.
    def __init__(self) -> None:
        """Create random embeddings."""
        super().__init__()
        self.word = nn.Embedding(len(VOCABULARY), WIDTH)
        self.place = nn.Embedding(MAX_WORDS, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings [B, MAX_WORDS, WIDTH] of tokens [B, MAX_WORDS]."""
        embeddings: Tensor = self.word(tokens) + self.place.weight
        return embeddings


def build_transformer() -> Any:
    """Return the transformer with random weights: 4 blocks of width 96, 16 image tokens."""
    return _Transformer(
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
    """`Backbone` of the bundled model, with classifier-free guidance."""

    latent_shape = (4, 8, 8)
    lora_format: Any = SD3LoraLoaderMixin
    lora_targets: ClassVar[list[str]] = [
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ]
    embedded_guidance = False

    def __init__(self, transformer: Any, words: WordTable, vae: Any) -> None:
        """Combine the parts. The word table and the autoencoder are frozen.

        Args:
            transformer: an SD3Transformer2DModel.
            words: word embeddings.
            vae: an AutoencoderTiny.
        """
        self.transformer = transformer
        self.words = words.requires_grad_(False).eval()
        self.vae: Any = vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @classmethod
    def load(
        cls,
        model: ModelConfig = BUNDLED,
        dtypes: Dtypes | None = None,  # noqa: ARG003
    ) -> "ShapesBackbone":
        """Return the backbone with the bundled weights, or with the weights in `model.path`.

        Args:
            model: settings. Only `path` is used: a directory that `save` has written.
            dtypes: not used. The model is loaded in float32.

        Raises:
            SettingsError: the directory does not contain the weights.
        """
        folder = Path(model.path) if model.path else WEIGHTS
        if not (folder / "words.safetensors").exists():
            raise SettingsError(
                f"model.path={folder}: the directory contains no words.safetensors. "
                "Remove model.path to use the bundled weights."
            )
        words = WordTable()
        words.load_state_dict(load_file(folder / "words.safetensors"))
        transformer = _Transformer.from_pretrained(folder / "transformer")
        return cls(transformer, words, _Autoencoder.from_pretrained(folder / "vae"))

    def save(self, folder: Path) -> None:
        """Write the weights to a directory, in the format of `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.words.state_dict(), folder / "words.safetensors")
        self.transformer.save_pretrained(folder / "transformer")
        self.vae.save_pretrained(folder / "vae")

    def to(self, device: torch.device) -> None:
        """Move all parts to `device`."""
        for part in (self.transformer, self.words, self.vae):
            part.to(device)

    @property
    def blocks(self) -> list[nn.Module]:
        """The joint blocks of the transformer."""
        return list(self.transformer.transformer_blocks)

    def load_lora(self, path: Path) -> None:
        """Load the LoRA weights of a directory or file into the transformer, with scale 1."""
        state, metadata = self.lora_format.lora_state_dict(path, return_lora_metadata=True)
        self.lora_format.load_lora_into_transformer(state, self.transformer, metadata=metadata)

    def natural_shift(self, num_steps: int) -> Shift:  # noqa: ARG002
        """Return shift 3, as in SD3. The last step starts at 1 / T before the shift."""
        return Shift(3.0)

    def check(self, texts: Sequence[str]) -> None:
        """Check that the grammar contains all `texts`.

        Raises:
            ValueError: it does not contain a text. The message has its number and valid examples.
        """
        for number, text in enumerate(texts, 1):
            try:
                tokenize(text)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None

    def bundled_prompts(self, split: str) -> list[str]:
        """Return the prompts of the grammar in `split`."""
        return list(grammar.prompts(split))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Return the word embeddings "words" [B, MAX_WORDS, WIDTH] and their mean "pooled"."""
        tokens = torch.tensor([tokenize(text) if text else [0] * MAX_WORDS for text in texts])
        words = self.words(tokens.to(self.words.place.weight.device))
        return {"words": words, "pooled": words.mean(1)}

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Return the velocity v [B, 4, 8, 8]."""
        v: Tensor = transformer(
            hidden_states=x,
            encoder_hidden_states=cond["words"].to(x.dtype),
            pooled_projections=cond["pooled"].to(x.dtype),
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        return v

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [I, 4, 8, 8] of images [I, 3, 32, 32] in 0..1."""
        scale, shift = self.vae.config["scaling_factor"], self.vae.config["shift_factor"]
        pixels = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        latents: Tensor = self.vae.encode(pixels).latents
        scaled: Tensor = ((latents - shift) * scale).contiguous()
        return scaled

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, 32, 32] in 0..1 of latents [B, 4, 8, 8]."""
        scale, shift = self.vae.config["scaling_factor"], self.vae.config["shift_factor"]
        scaled = (latents.float() / scale + shift).contiguous(memory_format=torch.channels_last)
        images: Tensor = self.vae.decode(scaled).sample
        return (images / 2 + 0.5).clamp(0, 1)
