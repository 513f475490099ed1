"""The results of a bench as Markdown and JSON.

The columns of training steps follow the tables of verl-omni (docs/algo/performance.md): batch size,
images per prompt, images per GPU and second, and seconds per step.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrain.records.files import write_atomically
from flowgrain.records.json_text import to_json
from flowgrain.settings import SettingsError

MARKDOWN, JSON = "results.md", "results.json"
Record = Mapping[str, Any]
Row = Sequence[object]


def write_results(out: Path, records: Sequence[Record]) -> None:
    """Write results.md and results.json."""
    write_atomically(out / JSON, to_json({"steps": list(records)}))
    write_atomically(out / MARKDOWN, markdown(records))


def read_results(out: Path) -> list[dict[str, Any]]:
    """The records of the steps in `out`.

    Raises:
        SettingsError: the directory contains no results.
    """
    try:
        content = json.loads((out / JSON).read_text(encoding="utf-8"))
        return list(content["steps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"--report {out}: contains no results of flowgrain bench: {JSON} is missing or "
            "damaged. Give the directory of --out."
        ) from error


def markdown(records: Sequence[Record]) -> str:
    """All tables. Tables without rows are left out."""
    parts = ["# flowgrain bench", *_machine(records)]
    for title, head, rows in (
        ("Steps", ("Step", "Status", "Seconds", "Error"), list(_steps(records))),
        ("Checks", ("Check", "Result", "Error", "Limit", "Remark"), list(_checks(records))),
        ("Training steps", _STEP_HEAD, list(_training_steps(records))),
        ("Stages of a training step", _STAGE_HEAD, list(_stages(records))),
        ("Model calls", _CALL_HEAD, list(_calls(records))),
        ("Other measurements", ("Measurement", "Values"), list(_others(records))),
        ("Not measured", ("Measurement", "Outcome", "Reason"), list(_missing(records))),
    ):
        if rows:
            parts.append(_table(title, head, rows))
    return "\n\n".join(parts) + "\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _measurements(
    records: Sequence[Record], accept: Callable[[Record], bool]
) -> Iterator[tuple[Record, Mapping[str, Any]]]:
    """The accepted measurements with their values."""
    for record in records:
        for entry in record["measurements"]:
            if accept(entry):
                yield entry, entry.get("values", {})


def _machine(records: Sequence[Record]) -> list[str]:
    found: dict[str, Any] = {}
    for entry, values in _measurements(records, lambda e: e["name"] in ("versions", "device")):
        found |= {"device": values.get("name"), **values} if entry["name"] == "device" else values
    keys = ("device", "memory_gb", "torch", "cuda", "python", "diffusers", "transformers")
    text = ", ".join(f"{key} {_cell(found[key])}" for key in keys if found.get(key) is not None)
    return [text] if text else []


def _steps(records: Sequence[Record]) -> Iterator[Row]:
    for record in records:
        yield record["step"], record["status"], record.get("seconds"), record.get("error")


def _is_check(entry: Record) -> bool:
    failed = entry["outcome"] == "failed" and entry.get("reason") is None
    return "limit" in entry.get("values", {}) or entry["outcome"] == "passed" or failed


def _checks(records: Sequence[Record]) -> Iterator[Row]:
    for entry, values in _measurements(records, _is_check):
        others = {k: v for k, v in values.items() if k not in ("error", "limit")}
        yield (
            entry["name"],
            entry["outcome"],
            values.get("error"),
            values.get("limit"),
            _pairs(others),
        )


_STEP_HEAD = (
    *("Run", "Resolution", "Rows per call", "# GPUs", "Batch size", "Images per prompt"),
    *("Throughput (images/GPU/s)", "Time per step (s)", "Remark"),
)


def _training_steps(records: Sequence[Record]) -> Iterator[Row]:
    for entry, values in _measurements(records, lambda e: "recipe" in e.get("values", {})):
        name = f"{entry['name'].removeprefix('training step, ')}, {values['method']}"
        size = values["resolution"]
        published, recipe = values["published"], values["recipe"]
        images = values["prompts"] * values["images_per_prompt"]
        own = values["prompts"], values["images_per_prompt"]
        yield (
            *(name, size, values["batch"], values["gpus"], *own),
            *(values["images_per_second"], values["seconds"], "cut down, measured"),
        )
        yield (
            *(f"{name}, published loop", size, 1, values["gpus"], *own),
            *(images / published["seconds"], published["seconds"]),
            f"cut down, measured; median ratio {_cell(values['ratio'])}",
        )
        yield (
            *(name, size, values["batch"], values["gpus"]),
            *(recipe["prompts"], recipe["images_per_prompt"]),
            *(recipe["computed_images_per_second"], recipe["computed_seconds"]),
            "complete recipe, computed from the measured stages",
        )


_STAGE_HEAD = ("Run", "Forward passes", "Sample (s)", "Decode (s)", "Score (s)", "Update (s)")


def _stages(records: Sequence[Record]) -> Iterator[Row]:
    stages = ("sample", "decode", "score", "update")
    for entry, values in _measurements(records, lambda e: "recipe" in e.get("values", {})):
        for label, side in (("flowgrain", values), ("published loop", values["published"])):
            name = f"{entry['name'].removeprefix('training step, ')}, {label}"
            yield name, side["forward_passes"], *(side["stages"][stage] for stage in stages)


_CALL_HEAD = (
    *("Measurement", "Resolution", "Rows", "Rows/s", "Images/s", "Seconds"),
    *("TFLOP/s", "MFU", "Peak memory (GB)"),
)


def _is_call(entry: Record) -> bool:
    return "rows_per_second" in entry.get("values", {})


def _calls(records: Sequence[Record]) -> Iterator[Row]:
    names = ("resolution", "batch", "rows_per_second", "images_per_second", "seconds")
    for entry, values in _measurements(records, _is_call):
        rates = values.get("tflops_per_second"), values.get("mfu"), values.get("peak_gb")
        yield entry["name"], *(values.get(name) for name in names), *rates


def _others(records: Sequence[Record]) -> Iterator[Row]:
    def accept(entry: Record) -> bool:
        known = _is_check(entry) or _is_call(entry) or "recipe" in entry.get("values", {})
        about = entry["name"] in ("versions", "device")
        return entry["outcome"] == "measured" and not known and not about

    for entry, values in _measurements(records, accept):
        if values:
            yield entry["name"], _pairs({k: v for k, v in values.items() if k != "repeats"})


def _missing(records: Sequence[Record]) -> Iterator[Row]:
    for entry, _ in _measurements(records, lambda e: e.get("reason") is not None):
        yield entry["name"], entry["outcome"], entry["reason"]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_cell(value)}" for key, value in values.items() if value is not None)
