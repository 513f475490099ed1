"""Checkpoints of a run.

A checkpoint is written to a temporary directory, flushed, verified by checksum, and then renamed.
The latest checkpoints and the best checkpoint are kept.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowgrain.distributed import SINGLE, World
from flowgrain.distributed.storage import read_tensors, write_tensors
from flowgrain.records.files import flush
from flowgrain.records.json_text import is_number

METRICS = "metrics.jsonl"
"""File of a checkpoint with the metrics of the run up to its step."""
_NAME = re.compile(r"step-(\d{6,})$")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read.

    The message names the checkpoint, the reason, and the checkpoint that is still good.
    """


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The training step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def path_of(folder: Path, step: int) -> Path:
    """The path of the checkpoint of training step `step`."""
    return folder / f"step-{step:06d}"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    score: float | None,
    keep: int,
    world: World = SINGLE,
    metrics: str = "",
) -> Path:
    """Write a checkpoint to `folder`/step-NNNNNN, and delete old checkpoints.

    All ranks must call it together.

    Args:
        folder: directory of the checkpoints.
        step: training step.
        tensors: written as safetensors. Each rank writes its own shards.
        state: written as JSON.
        score: the checkpoint with the highest score is kept. None: the checkpoint has no score.
        keep: number of latest checkpoints to keep.
        world: ranks.
        metrics: lines of metrics.jsonl, written to a file of the checkpoint.

    Raises:
        CheckpointError: the checkpoint could not be written, or does not contain the written
            values. It is raised on all ranks. Earlier checkpoints are intact.
    """
    final = path_of(folder, step)
    temporary = folder / f".tmp-{final.name}"

    def begin() -> None:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

    def end() -> None:
        if world.is_main:
            (temporary / METRICS).write_text(metrics, encoding="utf-8")
            _write_manifest(temporary, {"step": step, "score": score, "state": state})
            replace_folder(temporary, final)
            flush(folder)

    try:
        _together(begin, world)
        _together(lambda: write_tensors(temporary, tensors, world), world)
        _together(end, world)
    except OSError as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not write the checkpoint {final}: {error}. {_last_good_text(folder)}. "
            "Free some disk space and resume"
        ) from error
    if world.is_main:
        _delete_old(folder, keep, final)
    return final


def _last_good_text(folder: Path) -> str:
    rest = checkpoints(folder)
    return f"The last good checkpoint is {rest[-1]}" if rest else "There is no earlier checkpoint"


def _together(work: Callable[[], None], world: World) -> None:
    """Run `work` on all ranks. Raises OSError on all ranks if it failed on any rank."""
    failure = None
    try:
        work()
    except (OSError, RuntimeError) as error:
        failure = str(error)
    failures = [message for message in world.gather(failure) if message is not None]
    if failures:
        raise OSError("; ".join(dict.fromkeys(failures)))


def _write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    files = [*sorted(folder.glob("*.safetensors")), folder / METRICS]
    for file in files:
        flush(file)
    checksums = {file.name: _checksum(file) for file in files}
    (folder / "manifest.json").write_text(json.dumps({**values, "sha256": checksums}))
    flush(folder / "manifest.json")
    flush(folder)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(new: Path, final: Path) -> None:
    """Move directory `new` to `final`.

    If the process is killed, either the complete old or the complete new directory exists.
    """
    before = final.with_name(f".old-{final.name}")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        final.rename(before)
    new.rename(final)
    shutil.rmtree(before, ignore_errors=True)


def repair(folder: Path) -> None:
    """Repair `folder` after a kill: restore replaced checkpoints, delete incomplete checkpoints."""
    for before in folder.glob(".old-step-*"):
        final = before.with_name(before.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(final)
    for incomplete in folder.glob(".tmp-step-*"):
        shutil.rmtree(incomplete, ignore_errors=True)


def mark_damaged(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is no longer used."""
    replace_folder(path, path.with_name(f"damaged-{path.name}"))


def score(path: Path) -> float | None:
    """The score of a checkpoint. None: it was not evaluated, or has an alarm."""
    try:
        found = json.loads((path / "manifest.json").read_text())["score"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(found) if is_number(found) and math.isfinite(found) else None


def best(folder: Path) -> Path | None:
    """The checkpoint with the highest score. None if no checkpoint has a score."""
    scored = [(s, path) for path in checkpoints(folder) if (s := score(path)) is not None]
    return max(scored, default=(0, None), key=lambda pair: pair[0])[1]


def _delete_old(folder: Path, keep: int, written: Path) -> None:
    kept = {*checkpoints(folder)[-keep:], best(folder), written}
    for path in checkpoints(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> dict[str, Any]:
    """The JSON state of checkpoint `path`, after verifying the checksums of its files.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
    """
    try:
        manifest = _manifest(path)
        for name, checksum in manifest["sha256"].items():
            if _checksum(path / name) != checksum:
                raise ValueError(f"the checksum of {name} does not match")
        return dict(manifest["state"])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: manifest.json is not the record of a checkpoint"
        ) from error


def _manifest(path: Path) -> Any:
    """The content of manifest.json of checkpoint `path`.

    Raises:
        ValueError: it is empty, or not JSON.
        OSError: it cannot be read.
    """
    content = (path / "manifest.json").read_bytes()
    if not content.strip(b"\0 \n"):
        raise ValueError("manifest.json is empty")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("manifest.json is not JSON") from None


def load_last_good(
    folder: Path, world: World = SINGLE
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Read the newest undamaged checkpoint. Rank 0 reads for all ranks.

    The folder is not changed, because the run may be writing its next checkpoint.

    Returns:
        The path of the checkpoint, or None without checkpoints; its state; and a message for each
        damaged checkpoint that was skipped.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    result = world.gather(_last_good(folder) if world.is_main else None)[0]
    if isinstance(result, CheckpointError):
        raise result
    if result is None:
        raise CheckpointError(f"rank 0 sent no checkpoint of {folder}")
    return result


def _last_good(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]] | CheckpointError:
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return path, load(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        others = f" ({len(damaged)} checkpoints are damaged)" if len(damaged) > 1 else ""
        return CheckpointError(
            f"{damaged[0]}{others}. No undamaged checkpoint is left in {folder}. "
            "Start a new run with another --out"
        )
    return None, {}, damaged


def read(path: Path, tensors: Mapping[str, Tensor], world: World = SINGLE) -> None:
    """Fill `tensors` in place from checkpoint `path`.

    Raises:
        CheckpointError: the checkpoint does not contain a tensor, or it has another shape.
    """
    try:
        read_tensors(path, tensors, world)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} belongs to another model: {error}") from error
