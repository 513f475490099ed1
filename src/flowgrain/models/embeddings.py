"""Prompt embeddings on disk: what text encoders made once is not made again, and they need not be loaded for it."""

import hashlib
import logging
import os
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

log = logging.getLogger(__name__)


def fingerprint(model: str, revision: str | None) -> str:
    """Names a model's text encoders: hub name and revision, or a folder with its encoders' files, sizes and times."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    files = sorted(p for part in ("text_encoder*", "tokenizer*") for p in folder.glob(f"{part}/*") if p.is_file())
    stamp = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f"{folder.resolve()}#{hashlib.sha256(repr(stamp).encode()).hexdigest()}"


class EmbeddingCache:
    """A file a prompt in `folder`, for one model and one way of encoding (`key`). A damaged or foreign file counts as missing."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.damaged = 0

    def path(self, prompt: str) -> Path:
        """Where the embedding of `prompt` is, if it is there."""
        digest = hashlib.sha256(f"{self.key}\0{prompt}".encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def get(self, prompt: str) -> dict[str, Tensor] | None:
        """The tensors of `prompt`, without batch axis; None if they are not there or not whole."""
        path = self.path(prompt)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise ValueError("its checksum does not match")
            return load(data[32:])
        except (ValueError, safetensors.SafetensorError) as error:
            self.damaged += 1
            log.warning("the cached embedding %s is damaged (%s); it is made again", path, error)
            return None

    def put(self, prompt: str, tensors: dict[str, Tensor]) -> None:
        """Writes the tensors of `prompt`; a reader never finds half of them."""
        path = self.path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        temporary.replace(path)


def stack(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of several prompts' tensors."""
    return {name: torch.stack([tensors[name] for tensors in found]) for name in found[0]}
