"""The runs: their list, their settings and their metrics."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from flowgrain import __version__
from flowgrain.records import Run, load_run
from flowgrain.records.evaluations import evaluation_files
from flowgrain.records.json_text import parse_json
from flowgrain.records.metrics import describe_lines
from flowgrain.view.catalog import Catalog, Entry
from flowgrain.view.metrics import Curves, Summary
from flowgrain.view.readable import readable
from flowgrain.view.scores import describe

_STAGE = "seconds/"
_COSTS = ("forward_passes", "train_forward_passes", "decodes", "seconds")


def overview(catalog: Catalog) -> dict[str, Any]:
    """The answer to /api/runs: a row of every run and of every evaluation."""
    damaged: list[str] = []
    runs = [readable(damaged, row, entry) for entry in catalog.entries("run")]
    found = [readable(damaged, describe, entry) for entry in catalog.entries("evaluation")]
    return {
        "runs": [found for found in runs if found],
        "evaluations": [found for found in found if found],
        "version": __version__,
        "damaged": [*catalog.problems, *damaged],
    }


def run_of(entry: Entry) -> Run:
    """The run of a directory.

    Raises:
        SettingsError: its run.yaml is not readable.
    """
    return entry.cached("run", lambda: load_run(entry.folder))


def row(entry: Entry) -> dict[str, Any]:
    """The row of a run in the list of runs.

    Raises:
        SettingsError: its run.yaml is not readable.
    """
    found = entry.cached("row", lambda: _row(entry))
    status = run_of(entry).status_after(found["step"], found["seconds"])  # of the process
    return {**found, "status": status}


def _row(entry: Entry) -> dict[str, Any]:
    run = run_of(entry)
    summary = entry.state.setdefault("summary", Summary(entry.file("metrics.jsonl")))
    summary.update()
    scores = _scores(entry, run, summary)
    runtime = run.config.get("runtime")
    return {
        "id": entry.id,
        "kind": "run",
        "name": run.name,
        "folder": str(entry.folder),
        "method": run.method,
        "title": str(run.record.get("title") or run.method),
        "model": run.model,
        "rewards": run.rewards,
        "step": summary.last.get("step", 0),
        "max_steps": run.max_steps,
        "started": _time(entry, "run.yaml"),
        "updated": _time(entry, "metrics.jsonl") or _time(entry, "run.yaml"),
        "first": {name: values[0][1] for name, values in scores.items()},
        "best": {name: _best(values) for name, values in scores.items()},
        "last": {name: values[-1][1] for name, values in scores.items()},
        "alarms": len(run.alarms),
        "seed": runtime.get("seed") if isinstance(runtime, dict) else None,
        "seconds": summary.seconds,
    }


def _scores(entry: Entry, run: Run, summary: Summary) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of the rewards: of the evaluations, or of the rollouts if there are none."""
    evaluation = run.config.get("evaluation")
    held_out = evaluation.get("rewards") if isinstance(evaluation, dict) else None
    names = [r.get("name") for r in held_out or () if isinstance(r, dict)]
    scores = summary.scores("eval/", [*run.rewards, *map(str, names)])
    if scores:
        return scores
    curves = curves_of(entry)
    steps = curves.column("step").astype(int).tolist()
    columns = {name: curves.column(f"reward/{name}").tolist() for name in run.rewards}
    pairs = {
        name: [(step, value) for step, value in zip(steps, column, strict=True) if value == value]
        for name, column in columns.items()
    }
    return {name: values for name, values in pairs.items() if values}


def _best(values: Sequence[tuple[int, float]]) -> dict[str, Any]:
    step, value = max(values, key=lambda pair: pair[1])
    return {"value": value, "step": step}


def _time(entry: Entry, name: str) -> str | None:
    """The time of a file in ISO format."""
    try:
        seconds = entry.file(name).stat().st_mtime
    except OSError:
        return None
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def curves_of(entry: Entry) -> Curves:
    """The metrics of a run, with all lines that are on the disk."""

    def update() -> Curves:
        curves: Curves = entry.state.setdefault("curves", Curves(entry.file("metrics.jsonl")))
        curves.update()
        return curves

    return entry.cached("curves", update)


def details(entry: Entry) -> dict[str, Any]:
    """The answer to /api/runs/ID.

    Raises:
        SettingsError: its run.yaml is not readable.
    """
    run, curves = run_of(entry), curves_of(entry)
    damaged = [f"metrics.jsonl: {describe_lines(curves.damaged)}"] if curves.damaged else []
    stages = [key for key in curves.keys if key.startswith(_STAGE)]
    last = {key: curves.total([key])[-1:].sum() for key in (*_COSTS, *stages)}
    return {
        **row(entry),
        "config": run.config,
        "history": run.record.get("history", []),
        "versions": run.record.get("versions", {}),
        "given": run.record.get("given", []),
        "alarms": run.alarms,
        "best_checkpoint": readable(damaged, _json_file, entry, "best.json"),
        "calibration": readable(damaged, _json_file, entry, "calibration.json"),
        "cost": {
            **{key: float(last[key]) for key in _COSTS},
            "stages": {key.removeprefix(_STAGE): float(last[key]) for key in stages},
        },
        "group_steps": run.groups.steps,
        "evaluation_steps": [step_of(path) for path in evaluation_files(entry.file("evaluations"))],
        "keys": curves.keys,
        "damaged": damaged,
    }


def step_of(path: Path) -> int:
    """The step of a file NAME-STEP.SUFFIX."""
    return int(path.stem.rpartition("-")[2])


def _json_file(entry: Entry, name: str) -> Any:
    """The content of a JSON file. None if there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    path = entry.file(name)
    try:
        return parse_json(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def difference(first: Entry, second: Entry) -> dict[str, Any]:
    """The settings in which two runs differ.

    Raises:
        SettingsError: a run.yaml is not readable.
    """
    a, b = (dict(_flat(run_of(entry).config)) for entry in (first, second))
    paths = [path for path in {**a, **b} if a.get(path) != b.get(path)]
    return {"rows": [{"path": path, "a": a.get(path), "b": b.get(path)} for path in paths]}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by full path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
