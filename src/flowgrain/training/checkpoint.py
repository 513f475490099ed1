"""Checkpoints: written to a temporary name, flushed, verified by checksum, then renamed; the last N and the best are kept."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowgrain.distributed.mesh import ALONE, Group, read_tensors, write_tensors

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
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_NAME.match(path.name)[1]))  # type: ignore[index]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
    score: float | None,
    keep: int,
    group: Group = ALONE,
) -> Path:
    """Writes `tensors` (safetensors) and `plain` (JSON) as `folder`/step-NNNNNN and drops what is no longer kept.

    score ranks checkpoints for "the best is kept"; None does not compete. All processes of `group` call it together, each writes
    its share. Raises CheckpointError in all of them, with every earlier checkpoint intact, if it could not be written (a full
    disk, say) or does not read back as written.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".tmp-{final.name}"

    def together(work: Callable[[], None]) -> None:
        """Does a part of it, and raises OSError everywhere if it failed anywhere."""
        try:
            work()
            failed = None
        except (OSError, RuntimeError) as error:
            failed = str(error)
        every = [one for one in group.collect(failed) if one is not None]
        if every:
            raise OSError("; ".join(dict.fromkeys(every)))

    def begin() -> None:
        if group.first:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

    def end() -> None:
        if not group.first:
            return
        files = sorted(temporary.glob("*.safetensors"))
        for file in files:
            _flush(file)
        manifest = {"step": step, "score": score, "sha256": {file.name: _checksum(file) for file in files}, "plain": plain}
        (temporary / "manifest.json").write_text(json.dumps(manifest))
        _flush(temporary / "manifest.json")
        _flush(temporary)
        replace_folder(temporary, final)
        _flush(folder)

    try:
        together(begin)
        together(lambda: write_tensors(temporary, tensors, group))
        together(end)
    except OSError as error:
        if group.first:
            shutil.rmtree(temporary, ignore_errors=True)
        rest = checkpoints(folder)
        good = f"the last good one is {rest[-1]}" if rest else "there is no earlier one"
        raise CheckpointError(f"could not write the checkpoint {final}: {error}; {good}; free some space and resume") from error
    if group.first:
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
    """What checkpoint `path` holds beside tensors. Raises CheckpointError naming it if it is damaged or incomplete."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, checksum in manifest["sha256"].items():
            if _checksum(path / name) != checksum:
                raise ValueError(f"the checksum of {name} does not match what was written")
        return dict(manifest["plain"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def load_last_good(folder: Path, group: Group = ALONE) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that reads back whole, what it holds beside tensors, and a message for each damaged one passed over.

    None if the folder holds no checkpoint. Raises CheckpointError if it holds some and none is good. Only reads: the run may
    be writing its next checkpoint at this moment. The first process looks, for all.
    """
    found = group.collect(_last_good(folder) if group.first else None)[0]
    if isinstance(found, CheckpointError):
        raise found
    return found


def _last_good(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]] | CheckpointError:
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return path, load(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        return CheckpointError(f"{'; '.join(damaged)}; there is no good one left in {folder}: start anew with another --out")
    return None, {}, damaged


def read(path: Path, tensors: Mapping[str, Tensor], group: Group = ALONE) -> None:
    """Fills `tensors` in place from checkpoint `path`. Raises CheckpointError for one that it does not have."""
    try:
        read_tensors(path, tensors, group)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} is another model's: {error}") from error
