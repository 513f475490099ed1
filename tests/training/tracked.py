"""What a tracker has stored, read with its own library, and a run that a test kills."""

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from toy import PROMPTS, Toy, red

from flowgrain import Trainer, load_config

ASIDE = Path(sys.prefix) / "aside"
"""Where Trackio is installed: it would change the version of Pillow."""
CHANGES = {
    "sampling.num_steps": 4,
    "method.group_size": 3,
    "training.prompts_per_step": 2,
    "training.max_steps": 4,
    "training.checkpoint_every": 2,
    "evaluation.every": 2,
    "evaluation.num_prompts": 4,
    "evaluation.num_steps": 3,
    "evaluation.rewards": [],
    "runtime.threads": 1,
}


@dataclass
class Stored:
    """Records of a run: scalars (step, value) by name, tables by name and step, and the rest."""

    config: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    tables: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    alarms: list[tuple[int, str]] = field(default_factory=list)
    artifacts: list[set[str]] = field(default_factory=list)

    def steps(self, name: str) -> list[int]:
        return [step for step, _ in self.scalars[name]]


def tracked_trainer(
    folder: Path, trackers: list[str], changes: Mapping[str, Any] = MappingProxyType({})
) -> Trainer:
    config = load_config("g2rpo", {**CHANGES, "runtime.trackers": trackers, **changes})
    return Trainer(
        config,
        folder,
        backbone=Toy(),
        prompts=PROMPTS,
        eval_prompts=PROMPTS,
        rewards={"red": red},
    )


def read_tensorboard(folder: Path) -> Stored:
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    found = Stored()
    for tag in events.Tags()["scalars"]:
        found.scalars[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    texts = {
        tag.removesuffix("/text_summary"): [
            (e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }
    found.config = yaml.safe_load(texts["config"][0][1].strip("`").removeprefix("yaml"))
    found.alarms = texts.get("alarms", [])
    for name in ("evaluation", "group"):
        lines = {step: text.splitlines() for step, text in texts[name]}
        found.tables[name] = {
            step: [cell.strip() for cell in header.strip("| ").split("|")]
            for step, (header, *_) in lines.items()
        }
        step = min(lines)
        assert step in [image.step for image in events.Images(name)]
        found.images[name] = len(lines[step]) - 2
    return found


def wandb_records(file: Path) -> list[Any]:
    """The records of a .wandb file: the log format of LevelDB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, records, part, place = file.read_bytes(), [], b"", 7
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if kind == 0:
            break
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            records.append(Record.FromString(part))
            part = b""
    return records


def read_wandb(folder: Path) -> Stored:
    found = Stored()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.HasField("run"):
                for item in record.run.config.update:
                    found.config[item.key] = json.loads(item.value_json)
            if record.HasField("alert"):
                found.alarms.append((int(record.alert.text.split()[1][:-1]), record.alert.text))
            if record.HasField("artifact") and record.artifact.type == "model":
                contents = record.artifact.manifest.contents
                found.artifacts.append({entry.path for entry in contents})
            if record.HasField("history"):
                _add_history(found, record.history, file.parent)
    return found


def _add_history(found: Stored, history: Any, run: Path) -> None:
    items = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item
    }
    step = items.pop("step")
    for name in ("evaluation", "group"):
        if isinstance(items.get(name), dict) or any(key.startswith(f"{name}/") for key in items):
            path = items[name]["path"] if name in items else items[f"{name}/path"]
            table = json.loads((run / "files" / path).read_text())
            found.tables.setdefault(name, {})[step] = table["columns"]
            found.images.setdefault(name, len(table["data"]))
    for key, value in items.items():
        if isinstance(value, int | float):
            found.scalars.setdefault(key, []).append((step, value))


def read_trackio(folder: Path) -> Stored:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{folder.name}-{json.loads((folder / 'trackers.json').read_text())['id']}"
    (run,) = [run for run in trackio.Api().runs("flowgrain") if run.name == name]
    found = Stored(config=run.config or {})
    for line in SQLiteStorage.get_logs("flowgrain", name):
        for key, value in line.items():
            if isinstance(value, dict) and value.get("_type") == "trackio.table":
                table = value["_value"]
                found.tables.setdefault(key, {})[line["step"]] = list(table[0])
                images = [row["image"]["file_path"] for row in table]
                media = Path(os.environ["TRACKIO_DIR"]) / "media"
                assert all((media / path).is_file() for path in images)
                found.images.setdefault(key, len(images))
            elif isinstance(value, int | float):
                found.scalars.setdefault(key, []).append((line["step"], value))
    found.alarms = [(alert["step"], alert["text"]) for alert in run.alerts()]
    artifact = f"export-{name.rpartition('-')[2]}"
    manifest = SQLiteStorage.get_artifact_manifest("flowgrain", artifact, "latest")
    if manifest is not None:
        found.artifacts.append({entry["path"] for entry in manifest["manifest"]})
    return found


if __name__ == "__main__":  # killed after step 3, which is in no checkpoint
    trainer = tracked_trainer(Path(sys.argv[1]), sys.argv[2:])

    def kill(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            for worker in trainer.recorder.trackers._workers:
                while not worker._tasks.empty() and not worker._off.is_set():
                    time.sleep(0.01)
            time.sleep(1.5)  # Trackio writes twice a second
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.train(progress=kill)
