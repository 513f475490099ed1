"""What the backbones built on diffusers pipelines share: loading by part, cached prompt embeddings, decoding.

Shapes: B rows, *L latent, H x W pixels.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from flowgrain.models.base import Conditioning, Source
from flowgrain.models.embeddings import EmbeddingCache, fingerprint, stack

log = logging.getLogger(__name__)
_IN_MEMORY = 512
"""Prompts whose embeddings stay in memory: at FLUX.1's 4 MB each, 2 GB."""


class PipelineBackbone(ABC):
    """See `Backbone`. Transformer, VAE and the scheduler's settings are loaded at once, text encoders when they are needed."""

    pipeline: ClassVar[Any]
    encoders: ClassVar[tuple[str, ...]]
    """Names of the pipeline's parts that only encoding needs."""
    lora_format: type
    embedded_guidance: bool
    lora_targets: list[str]

    def __init__(self, source: Source) -> None:
        if not source.weights:
            raise ValueError(f"weights: model={source.model} needs them; give the path of a folder or a hub name")
        self.source = source
        self.pipe = self._load(**dict.fromkeys(self.encoders))
        self.transformer: nn.Module = self.pipe.transformer
        self.vae = self.pipe.vae.requires_grad_(False).eval()
        if source.vae_tiling:
            self.vae.enable_tiling()
        if source.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if source.attention_backend:
            self.transformer.set_attention_backend(source.attention_backend)
        key = f"{fingerprint(source.weights, source.revision)} tokens={source.max_prompt_tokens} t5={source.t5}"
        key += f" {source.dtypes.encoders}"
        self.cache = EmbeddingCache(Path(source.embedding_cache), key) if source.embedding_cache else None
        self._encoding: Any = None
        self._tokenizer: Any = None
        self._memory: dict[str, dict[str, Tensor]] = {}
        self.device = torch.device("cpu")
        step = self._token_side
        for name, size in (("height", source.height), ("width", source.width)):
            if size % step:
                raise ValueError(
                    f"{name}={size}: {source.model} takes multiples of {step}; {size // step * step} or {-(-size // step) * step}"
                )

    @classmethod
    def load(cls, source: Source) -> "PipelineBackbone":
        """The backbone of `source`. Raises ValueError naming the setting if its weights are not there or are another model's."""
        return cls(source)

    def _load(self, **parts: Any) -> Any:
        source = self.source
        folder = Path(source.weights or "")
        if folder.exists() and not (folder / "model_index.json").exists():
            raise ValueError(
                f"weights={source.weights}: there is no model_index.json, so this is no folder of a diffusers pipeline"
            )
        try:
            saved = self.pipeline.load_config(source.weights, revision=source.revision)
            left_out = [
                name for name in self.encoders if saved.get(name, [None])[0] is None or (name.endswith("_3") and not source.t5)
            ]
            return self.pipeline.from_pretrained(
                source.weights,
                revision=source.revision,
                dtype={"transformer": source.dtypes.transformer, "vae": source.dtypes.vae, "default": source.dtypes.encoders},
                **{**dict.fromkeys(left_out), **parts},
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"weights={source.weights}: {error}") from error

    def to(self, device: torch.device) -> None:
        self.device = device
        for part in (self.transformer, self.vae):
            part.to(device)

    @property
    def _token_side(self) -> int:
        """Pixels along the side of an image token: 2x2 latents make one, whether the pipeline or the transformer packs them."""
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.source.height // self._token_side, self.source.width // self._token_side

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """A grid of the VAE's latents; models that take it packed say otherwise."""
        scale = self.pipe.vae_scale_factor
        return self.transformer.config.in_channels, self.source.height // scale, self.source.width // scale

    def load_lora(self, path: Path) -> None:
        self.pipe.load_lora_weights(path)

    @property
    def sequence_length(self) -> int:
        """Image tokens of the transformer, from which pipelines compute the shift."""
        return math.prod(self.token_grid)

    def natural_shift(self, num_steps: int) -> tuple[float, float | None]:
        config = self.pipe.scheduler.config
        terminal = config.get("shift_terminal") or None
        if not config.get("use_dynamic_shifting", False):
            return float(config.get("shift", 1.0)), terminal
        mu = self._mu(num_steps)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu), terminal

    def _mu(self, num_steps: int) -> float:
        """mu of the dynamic shift, as most pipelines compute it: linear in the number of image tokens."""
        config = self.pipe.scheduler.config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        usual = (256, 4096, 0.5, 1.15)
        return calculate_shift(self.sequence_length, *(config.get(n, u) for n, u in zip(names, usual, strict=True)))

    def bundled_prompts(self, split: str) -> list[str]:
        return []  # of no split

    def check(self, prompts: Sequence[str]) -> None:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        if self._tokenizer is None:
            return
        limit = min(self.source.max_prompt_tokens, self._most_tokens)
        distinct = list(dict.fromkeys(prompts))
        counts = dict(zip(distinct, map(len, self._tokenizer(distinct)["input_ids"]), strict=True))
        long = [number for number, prompt in enumerate(prompts, 1) if counts[prompt] > limit]
        if long and self.source.long_prompts == "refuse":
            count = counts[prompts[long[0] - 1]]
            others = f" (as do {len(long) - 1:,} others)" if len(long) > 1 else ""
            way = f"raise max_prompt_tokens={self.source.max_prompt_tokens}" if limit < self._most_tokens else "have T5"
            raise ValueError(
                f"prompt {long[0]} has {count} tokens, more than {limit}{others}; shorten it, {way}, or set long_prompts=cut"
            )
        if long:
            log.warning("%d of %d prompts are cut to %d tokens", len(long), len(prompts), limit)

    _most_tokens = 2**31
    """What the encoder whose tokenizer counts can read at most, whatever is set."""

    @abstractmethod
    def _load_tokenizer(self) -> Any:
        """The tokenizer whose limit counts: of a list of prompts it makes the "input_ids"."""

    def _tokenizer_in(self, part: str) -> Any:
        """The tokenizer saved as `part`."""
        return AutoTokenizer.from_pretrained(self.source.weights, subfolder=part, revision=self.source.revision)

    def _chat_tokenizer(self, thinking: bool) -> Any:
        """A tokenizer for prompts written as a user's words into the chat template, whose tokens count too."""
        tokenizer = self._tokenizer_in("tokenizer")

        def tokenize(prompts: list[str]) -> Any:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return tokenizer.apply_chat_template(chats, add_generation_prompt=True, enable_thinking=thinking)

        return tokenize

    def encode(self, prompts: list[str]) -> Conditioning:
        return stack([self._embedding(prompt) for prompt in prompts])

    def _embedding(self, prompt: str) -> dict[str, Tensor]:
        """The tensors of `prompt`, without batch axis, on the CPU: from memory, from disk, or made now."""
        found = self._memory.pop(prompt, None)
        if found is None and self.cache is not None:
            found = self.cache.get(prompt)
        if found is None:
            if self._encoding is None:
                self._encoding = self._load(transformer=self.transformer, vae=self.vae).to(self.device)
            with torch.no_grad():  # one by one: in a batch its last bits would depend on its company, and differ after a resume
                made = self._encode(self._encoding, prompt)
            found = {name: value[0].cpu() for name, value in made.items()}
            if self.cache is not None:
                self.cache.put(prompt, found)
        self._memory[prompt] = found  # the last one used is the last to go
        if len(self._memory) > _IN_MEMORY:
            del self._memory[next(iter(self._memory))]
        return found

    @abstractmethod
    def _encode(self, pipe: Any, prompt: str) -> Conditioning:
        """Conditioning of `prompt`, one row, by the pipeline's own encode_prompt."""

    def _padded(self, embeds: Tensor) -> Conditioning:
        """Embeddings [n, D] of a prompt of n tokens as "embeds" [1, max_prompt_tokens, D] and "length" [1], which is n."""
        missing = self.source.max_prompt_tokens - len(embeds)
        return {"embeds": F.pad(embeds, (0, 0, 0, missing))[None], "length": torch.tensor([len(embeds)])}

    def _decode_grid(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 of unpacked latents [B, C, h, w], scaled as the VAE's config says."""
        config = self.vae.config
        return self._images(latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0))

    @torch.no_grad()
    def _images(self, latents: Tensor) -> Tensor:
        """Images in 0..1, fp32, of latents as the VAE takes them."""
        return (self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
