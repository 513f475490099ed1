"""Checkpoints: written to a temporary name, flushed, verified by checksum, then renamed; the last N and the best are kept."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

_NAME = re.compile(r"step-(\d{6,})$")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says which, why and what is still good."""


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader finds either the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_NAME.match(path.name)[1]))  # type: ignore[index]


def save(folder: Path, step: int, state: dict[str, Any], score: float | None, keep: int) -> Path:
    """Writes `state` (tensors, numbers, strings, dicts and lists) as `folder`/step-NNNNNN and drops what is no longer kept.

    score ranks checkpoints for "the best is kept"; None does not compete. Raises CheckpointError, with every earlier
    checkpoint intact, if it could not be written (a full disk, say) or does not read back as written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    temporary = folder / f".tmp-{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with hashed_writer(temporary / "state.pt") as writer:
            torch.save(state, cast(IO[bytes], writer))
            expected = writer
        manifest = {"step": step, "score": score, "sha256": expected.digest.hexdigest(), "bytes": expected.size}
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        _flush(temporary / "manifest.json")
        if _checksum(temporary / "state.pt") != manifest["sha256"]:
            raise OSError("what was read back is not what was written")
        _flush(temporary)
        replace_folder(temporary, final)
        _flush(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        rest = checkpoints(folder)
        good = f"the last good one is {rest[-1]}" if rest else "there is no earlier one"
        raise CheckpointError(f"could not write the checkpoint {final}: {error}; {good}; free some space and resume") from error
    _drop_old(folder, keep, final)
    return final


def replace_folder(new: Path, final: Path) -> None:
    """Puts the folder `new` in the place of `final` so that a kill at any moment leaves the old or the new one, whole."""
    before = final.with_name(f".old-{final.name}")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        final.rename(before)
    new.rename(final)
    shutil.rmtree(before, ignore_errors=True)


def mend(folder: Path) -> None:
    """Puts back what a kill in the middle of `replace_folder` left aside, and removes half-written checkpoints."""
    for before in folder.glob(".old-step-*"):
        final = before.with_name(before.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(final)
    for half in folder.glob(".tmp-step-*"):
        shutil.rmtree(half, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Renames a damaged checkpoint so that it no longer counts as one."""
    replace_folder(path, path.with_name(f"damaged-{path.name}"))


class _Hashing:
    """A file that hashes what is written to it, so that the checksum is of what was meant, not of what the disk made of it."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        self.file.write(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def hashed_writer(path: Path) -> Iterator[_Hashing]:
    """Opens `path` for writing; the bytes are hashed on their way and on the disk when the block ends."""
    with path.open("wb") as file:
        writer = _Hashing(file)
        yield writer
        file.flush()
        os.fsync(file.fileno())


def _score(path: Path) -> float | None:
    try:
        found = json.loads((path / "manifest.json").read_text())["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def best(folder: Path) -> Path | None:
    """The checkpoint with the highest score, if any has one."""
    scored = [(score, path) for path in checkpoints(folder) if (score := _score(path)) is not None]
    return max(scored, default=(0, None), key=lambda pair: pair[0])[1]


def _drop_old(folder: Path, keep: int, written: Path) -> None:
    kept = {*checkpoints(folder)[-keep:], best(folder), written}
    for path in checkpoints(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> dict[str, Any]:
    """The state in checkpoint `path`, on the CPU. Raises CheckpointError naming it if it is damaged or incomplete."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if _checksum(path / "state.pt") != manifest["sha256"]:
            raise ValueError("its checksum does not match what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error
    # What has the right checksum is no damage: whatever goes wrong now (memory, say) is for the caller to see.
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return state


def load_last_good(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that reads back whole, its state, and a message for each damaged one passed over.

    None if the folder holds no checkpoint. Raises CheckpointError if it holds some and none is good. Only reads: the run may
    be writing its next checkpoint at this moment.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return path, load(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}; there is no good one left in {folder}: start anew with another --out")
    return None, {}, damaged
