"""Prompts of diffusers pipelines: their numbers of tokens, and their embeddings.

The text encoders of a published model can be larger than its transformer. They are only in memory
while prompts are encoded.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from flowgrain.models.base import Conditioning, ModelConfig
from flowgrain.models.embeddings import EmbeddingCache, stack
from flowgrain.models.tokens import check_lengths, token_counts

_PROMPTS_IN_MEMORY = 512
"""Number of prompts whose embeddings stay in memory: 2 GB for FLUX.1, at 4 MB each."""


class PendingPrompts:
    """The prompts of a run that the text encoders still have to encode."""

    def __init__(self, cache: EmbeddingCache | None) -> None:
        """Begin without prompts. Nothing is known about the run, so `none_left` is False.

        Args:
            cache: where embeddings are stored. Ranks and earlier runs share it. Without a cache,
                the most recent embeddings are in memory.
        """
        self._cache = cache
        self._encoded: set[str] = set()
        self._known: dict[str, None] = {}
        self._pending: list[str] = []

    def add(self, texts: Iterable[str]) -> None:
        """Add prompts that the run may encode. The unconditional prompt always belongs to them."""
        new = [text for text in dict.fromkeys(["", *texts]) if text not in self._known]
        self._known.update(dict.fromkeys(new))
        self._pending += new

    def encoded(self, text: str) -> None:
        """Record that `text` was encoded."""
        self._encoded.add(text)

    def none_left(self) -> bool:
        """Whether the embeddings of all prompts are in the cache or in memory."""
        if self._cache is None and len(self._known) > _PROMPTS_IN_MEMORY:
            return False  # they are encoded again and again
        while self._pending and self._is_encoded(self._pending[-1]):
            self._pending.pop()
        return bool(self._known) and not self._pending

    def _is_encoded(self, text: str) -> bool:
        return text in self._encoded or (
            self._cache is not None and self._cache.path(text).exists()
        )


class PromptEncoding(ABC):
    """The part of a `PipelineBackbone` that encodes prompts."""

    encoders: ClassVar[tuple[str, ...]]
    """Parts of the pipeline that are only needed to encode prompts."""

    config: ModelConfig
    device: torch.device

    def init_encoding(self, cache: EmbeddingCache | None) -> None:
        """Begin without text encoders and with the embeddings in `cache`."""
        self.cache = cache
        self._encoding_pipe: Any = None
        self._pending = PendingPrompts(cache)
        self._recent_embedding = lru_cache(_PROMPTS_IN_MEMORY)(self._embedding)

    @abstractmethod
    def _load_pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Load the pipeline. `parts` are used as they are and not loaded."""

    @abstractmethod
    def _encoding_parts(self) -> dict[str, Any]:
        """The parts that a pipeline for encoding shares with this backbone."""

    def check(self, texts: Sequence[str]) -> None:
        """Check that no text has more tokens than the text encoders read.

        The text encoders are freed when all checked texts have been encoded.

        Raises:
            ValueError: a text is too long and model.long_prompts is "error".
        """
        distinct = list(dict.fromkeys(texts))
        self._pending.add(distinct)
        counts = dict(zip(distinct, self._token_counts(distinct), strict=True))
        check_lengths([counts[text] for text in texts], self.config, self._encoder_limit)

    @property
    def _encoder_limit(self) -> int | None:
        """Maximum number of tokens that the text encoders read; None if there is none."""
        return None

    @property
    def _tokenizer_name(self) -> str:
        """The part of the pipeline whose tokens are counted."""
        return "tokenizer"

    @cached_property
    def _tokenizer(self) -> Any:
        path, revision = self.config.path, self.config.revision
        return AutoTokenizer.from_pretrained(
            path, subfolder=self._tokenizer_name, revision=revision
        )

    def _token_counts(self, texts: list[str]) -> list[int]:
        """Number of tokens of each text."""
        return token_counts(self._tokenizer, texts)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Return the conditioning of `texts` on the CPU, one row each."""
        rows = stack([self._recent_embedding(text) for text in texts])
        keep = self.config.keep_encoders or self._encoding_pipe is None
        if not keep and self._pending.none_left():
            self._encoding_pipe = None
        return rows

    def _embedding(self, text: str) -> dict[str, Tensor]:
        """Tensors of `text` without batch axis, on the CPU: from the cache, or encoded now."""
        tensors = None if self.cache is None else self.cache.get(text)
        if tensors is not None:
            return tensors
        if self._encoding_pipe is None:
            self._encoding_pipe = self._load_pipeline(self._encoding_parts())
            self._move_encoders()
        # One prompt at a time: in a batch, the last bits depend on the other prompts, and a resumed
        # run encodes other batches.
        with torch.no_grad():
            row = self._encode(self._encoding_pipe, text)
        tensors = {name: value[0].cpu() for name, value in row.items()}
        if self.cache is not None:
            self.cache.put(text, tensors)
        self._pending.encoded(text)
        return tensors

    def _move_encoders(self) -> None:
        """Move the text encoders to the device, if they are loaded."""
        for name in self.encoders if self._encoding_pipe is not None else ():
            part = getattr(self._encoding_pipe, name)
            if isinstance(part, nn.Module):
                part.to(self.device)

    @abstractmethod
    def _encode(self, pipe: Any, text: str) -> Conditioning:
        """Conditioning of one text, one row, from the pipeline's own encode_prompt."""
