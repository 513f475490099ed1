"""What the backbones built on diffusers pipelines share: loading by part, cached prompt embeddings, decoding.

Shapes: B rows, *L latent, H x W pixels.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from flowgrain.backbones.base import Conditioning, Source
from flowgrain.backbones.embeddings import EmbeddingCache, fingerprint, stack

_ENCODING_BATCH = 16


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
        self.cache = EmbeddingCache(Path(source.embedding_cache), key) if source.embedding_cache else None
        self._encoding: Any = None
        self._tokenizer: Any = None
        self._memory: dict[str, dict[str, Tensor]] = {}
        self.device = torch.device("cpu")
        step = self.pipe.vae_scale_factor * self.transformer.config.patch_size * self._packing
        for name, size in (("height", source.height), ("width", source.width)):
            if size % step:
                raise ValueError(
                    f"{name}={size}: {source.model} takes multiples of {step}; {size // step * step} or {-(-size // step) * step}"
                )

    _packing = 1

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
            return self.pipeline.from_pretrained(source.weights, revision=source.revision, **{**dict.fromkeys(left_out), **parts})
        except (OSError, ValueError) as error:
            raise ValueError(f"weights={source.weights}: {error}") from error

    def to(self, device: torch.device) -> None:
        self.device = device
        for part in (self.transformer, self.vae):
            part.to(device)

    @property
    def sequence_length(self) -> int:
        """Image tokens of the transformer, from which pipelines compute the shift."""
        side = self.pipe.vae_scale_factor * self.transformer.config.patch_size * self._packing
        return (self.source.height // side) * (self.source.width // side)

    def natural_shift(self) -> float:
        """The shift that the pipeline's own scheduler uses at this size: dynamic (exp mu), or its fixed one."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return float(config.get("shift", 1.0))
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        usual = (256, 4096, 0.5, 1.15)
        mu = calculate_shift(self.sequence_length, *(config.get(n, u) for n, u in zip(names, usual, strict=True)))
        return float(torch.tensor(mu, dtype=torch.float64).exp())

    def bundled_prompts(self, split: str) -> list[str]:
        return []  # of no split

    def check(self, prompt: str) -> None:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        if self._tokenizer is None or self.source.long_prompts == "cut":
            return
        count = len(self._tokenizer(prompt)["input_ids"])
        if count > self.source.max_prompt_tokens:
            limit = self.source.max_prompt_tokens
            raise ValueError(
                f"has {count} tokens, more than max_prompt_tokens={limit}; shorten it, raise that, or set long_prompts=cut"
            )

    @abstractmethod
    def _load_tokenizer(self) -> Any:
        """The tokenizer whose limit counts."""

    def encode(self, prompts: list[str]) -> Conditioning:
        missing = list(dict.fromkeys(p for p in prompts if p not in self._memory and not self._recall(p)))
        for first in range(0, len(missing), _ENCODING_BATCH):
            part = missing[first : first + _ENCODING_BATCH]
            if self._encoding is None:
                self._encoding = self._load(transformer=self.transformer, vae=self.vae).to(self.device)
            with torch.no_grad():
                made = self._encode(self._encoding, part)
            for i, prompt in enumerate(part):
                self._memory[prompt] = {name: value[i].cpu() for name, value in made.items()}
                if self.cache is not None:
                    self.cache.put(prompt, self._memory[prompt])
        return stack([self._memory[p] for p in prompts])

    def _recall(self, prompt: str) -> bool:
        found = self.cache.get(prompt) if self.cache is not None else None
        if found is not None:
            self._memory[prompt] = found
        return found is not None

    @abstractmethod
    def _encode(self, pipe: Any, prompts: list[str]) -> Conditioning:
        """Conditioning of `prompts` by the pipeline's own encode_prompt."""

    @torch.no_grad()
    def _decode_grid(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 of unpacked latents [B, C, h, w]."""
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0)
        return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
