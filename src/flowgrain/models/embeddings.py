"""Prompt embeddings on disk. Cached prompts need no text encoder."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

log = logging.getLogger(__name__)
_DIGEST_BYTES = 32


def fingerprint(model: str, revision: str | None) -> str:
    """Return a string that identifies the text encoders of a model.

    It contains the Hub name and revision, or the directory and the names, sizes and modification
    times of its text encoder files.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    parts = ("text_encoder*", "tokenizer*")
    files = sorted(p for part in parts for p in folder.glob(f"{part}/*") if p.is_file())
    stamp = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f"{folder.resolve()}#{hashlib.sha256(repr(stamp).encode()).hexdigest()}"


class EmbeddingCache:
    """Prompt embeddings in a directory, one file per prompt.

    Attributes:
        damaged: number of damaged files that `get` has found.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Open the cache. Nothing is written before the first `put`.

        Args:
            folder: directory of the cache. Several models can share it.
            key: identifies the text encoders and how they are used. Embeddings that were stored
                under another key are not found.
        """
        self.folder, self.key = folder, key
        self.damaged = 0

    def path(self, text: str) -> Path:
        """Return the file of the embedding of `text`, which may not exist."""
        digest = hashlib.sha256(f"{self.key}\0{text}".encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def get(self, text: str) -> dict[str, Tensor] | None:
        """Return the tensors of `text` without batch axis; None if missing or damaged."""
        path = self.path(text)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        checksum, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        try:
            if hashlib.sha256(data).digest() != checksum:
                raise ValueError("wrong checksum")
            return load(data)
        except (ValueError, safetensors.SafetensorError) as error:
            self.damaged += 1
            log.warning(
                "The cached embedding %s is damaged (%s). The prompt is encoded again.", path, error
            )
            return None

    def put(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of `text`. The file is replaced atomically."""
        path = self.path(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        temporary.replace(path)


def stack(embeddings: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of several prompts stacked along a new first axis."""
    return {name: torch.stack([e[name] for e in embeddings]) for name in embeddings[0]}
