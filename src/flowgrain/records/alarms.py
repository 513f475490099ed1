"""The alarms of a run and its best checkpoint: alarms.jsonl and best.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrain.records.files import write_atomically
from flowgrain.records.json_text import parse_json, to_json

ALARMS = "alarms.jsonl"
"""File with one JSON object per alarm."""
BEST = "best.json"
"""File that names the best checkpoint."""
RULE = "highest trained reward among checkpoints without an alarm"
"""Which checkpoint is the best."""


def read_alarms(folder: Path) -> list[dict[str, Any]]:
    """The lines of alarms.jsonl, without damaged lines. Empty if there is no such file."""
    file = folder / ALARMS
    lines = file.read_bytes().splitlines() if file.exists() else ()
    return [values for line in lines if (values := _with_step(line)) is not None]


def append_alarms(folder: Path, alarms: Sequence[Mapping[str, Any]]) -> None:
    """Append the alarms of an evaluation to alarms.jsonl.

    They replace earlier lines of the step: an evaluation that was interrupted after its alarms
    were written is repeated.
    """
    _write(folder, [*_up_to(folder, alarms[0]["step"] - 1), *alarms])


def discard_alarms_after(folder: Path, step: int) -> None:
    """Delete the alarms of steps after `step`, and damaged lines."""
    if (folder / ALARMS).exists():
        _write(folder, _up_to(folder, step))


def read_best(folder: Path) -> dict[str, Any] | None:
    """The content of best.json. None if it is missing or damaged."""
    try:
        return _with_step((folder / BEST).read_bytes())
    except OSError:
        return None


def write_best(folder: Path, step: int, score: float | None) -> None:
    """Write step and score of the best checkpoint to best.json."""
    write_atomically(folder / BEST, to_json({"step": step, "score": score, "rule": RULE}))


def delete_best(folder: Path) -> None:
    """Delete best.json: no checkpoint is the best."""
    (folder / BEST).unlink(missing_ok=True)


def _up_to(folder: Path, step: int) -> list[dict[str, Any]]:
    return [alarm for alarm in read_alarms(folder) if alarm["step"] <= step]


def _write(folder: Path, alarms: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(folder / ALARMS, "".join(f"{to_json(alarm)}\n" for alarm in alarms))


def _with_step(content: bytes) -> dict[str, Any] | None:
    """A JSON object with a step. None if `content` is something else."""
    try:
        values = parse_json(content)
    except ValueError:
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None
