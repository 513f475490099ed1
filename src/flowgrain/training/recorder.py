"""The files of a run: run.yaml, metrics.jsonl, evaluations/ and images/."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowgrain.config.schema import Config
from flowgrain.methods.calibration import CalibrationResult
from flowgrain.settings import SettingsError
from flowgrain.training.alarms import Difference
from flowgrain.training.evaluate import Evaluation
from flowgrain.training.files import write_atomically
from flowgrain.training.pictures import contact_sheet, enlarge, to_pixels
from flowgrain.training.records import set_damaged_files_aside, set_damaged_lines_aside
from flowgrain.training.rollout_batch import Metrics, RolloutBatch
from flowgrain.training.run_files import (
    forget_checkpoints,
    read_metrics,
    record_settings,
    write_run,
)
from flowgrain.training.watch_files import discard_after

EVALUATION_IMAGES = 24
"""Number of images of an evaluation that are recorded."""
EVALUATION_COLUMNS = 8
"""Columns of the contact sheet of an evaluation."""
TREE_COLUMNS = 16
"""Columns of the contact sheet of a tree."""
_OF_STEP = re.compile(r"[a-z-]+-(\d{6,})\.(?:json|png)")
"""Name of a file of a step in evaluations/ or images/, also of a damaged file."""


class Recorder:
    """Writes the files of a run.

    Args:
        folder: directory of the run.
        config: settings.
        given: names of the Trainer's arguments that replace settings, such as "rewards".
    """

    def __init__(self, folder: Path, config: Config, given: Sequence[str] = ()) -> None:
        self.folder, self.config, self.given = folder, config, list(given)
        self._resumed = False
        self._recorded = False
        self._loggers: list[Callable[[Metrics], None]] = []

    def check(self) -> None:
        """Check that the directory contains no other run.

        Raises:
            SettingsError: the directory contains a run that is not being resumed, is a file, or is
                not writable.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise SettingsError(f"--out {self.folder}: is a file. Give a directory.")
        if self.folder.is_dir() and not os.access(self.folder, os.W_OK):
            raise SettingsError(f"{self.folder}: is not writable. Give another --out, or chmod it.")
        if not self._resumed and (self.folder / "metrics.jsonl").exists():
            raise SettingsError(
                f"{self.folder} already contains a run. "
                f"Resume it with --resume {self.folder}, or set another --out."
            )

    def start(self) -> None:
        """Create the files. A resumed run keeps its run.yaml until it has trained a step.

        Raises:
            SettingsError: the directory contains a run that is not being resumed, or a logger is
                not installed.
        """
        self.check()
        for part in ("checkpoints", "images", "evaluations"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        loggers = self.config.runtime.loggers
        self._loggers = [_open_logger(kind, self.folder, self.config) for kind in loggers]
        if not self._resumed:
            forget_checkpoints(self.folder)
        if not (self._resumed and (self.folder / "run.yaml").exists()):
            write_run(self.folder, self.config, self.given)
        (self.folder / "metrics.jsonl").touch()

    def write_metrics(self, line: Metrics) -> None:
        """Append a line to metrics.jsonl and flush it to the disk.

        The first training step records the settings in run.yaml.
        """
        if not self._recorded and line["step"] > 0:
            record_settings(self.folder, self.config, self.given, line["step"])
            self._recorded = True
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for log in self._loggers:
            log(line)

    def read_metrics(self) -> list[Metrics]:
        """All lines of metrics.jsonl, without damaged lines."""
        return read_metrics(self.folder)

    def replace_last(self, line: Metrics) -> None:
        """Replace the last line of metrics.jsonl by `line`."""
        text = "".join(_json(m) + "\n" for m in [*self.read_metrics()[:-1], line])
        write_atomically(self.folder / "metrics.jsonl", text)

    def metrics_text(self) -> str:
        """The lines of metrics.jsonl, for a checkpoint."""
        return "".join(_json(line) + "\n" for line in self.read_metrics())

    def discard_after(self, step: int, metrics: str) -> list[str]:
        """Delete the records of steps after `step`, which the resumed run writes again.

        Damaged records are set aside. Step 0 deletes all records.

        Args:
            step: step of the checkpoint from which the run is resumed.
            metrics: lines of metrics.jsonl in the checkpoint.

        Returns:
            A message for each file with damaged records.
        """
        self._resumed = True
        file = self.folder / "metrics.jsonl"
        messages = set_damaged_lines_aside(file)
        if file.exists() or metrics:
            write_atomically(file, metrics if step > 0 else "")
        for part in ("", "evaluations", "images"):
            for path in (self.folder / part).glob(".*.tmp"):  # incomplete files
                path.unlink()
        for part in ("evaluations", "images"):
            for path in (self.folder / part).glob("*-[0-9]*"):
                of_step = _OF_STEP.fullmatch(path.name)  # other files are not of the run
                if of_step and int(of_step[1]) > (step or -1):
                    path.unlink()
        discard_after(self.folder, step)
        return messages + set_damaged_files_aside(self.folder)

    def write_evaluation(
        self, step: int, evaluation: Evaluation, base: Mapping[str, Difference]
    ) -> None:
        """Write the scores and monitors of all images, and a contact sheet of the first images.

        Args:
            step: training step.
            evaluation: the evaluation.
            base: paired differences to the base model by reward and monitor. Empty: not written.
        """
        values = {
            "step": step,
            "num_steps": evaluation.num_steps,
            "prompts": [prompt.text for prompt in evaluation.prompts],
            "scores": {k: [float(v) for v in values] for k, values in evaluation.scores.items()},
            "parts": evaluation.part_means(),
            **watch_values(evaluation, self.config.eval_guidance, base),
        }
        pixels = to_pixels(evaluation.images[:EVALUATION_IMAGES])
        sheet = enlarge(contact_sheet(pixels, EVALUATION_COLUMNS), pixels.shape[2])
        sheet.save(self.folder / "images" / f"evaluation-{step:06d}.png")
        write_atomically(self.folder / "evaluations" / f"step-{step:06d}.json", json.dumps(values))

    def write_tree(self, batch: RolloutBatch) -> None:
        """Write the tree of the first prompt, if the step is the first, the last or evaluated."""
        step, every = batch.step, self.config.evaluation.every
        if step not in (1, self.config.training.max_steps) and not (every and step % every == 0):
            return
        images = self.folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        table, leaves = _first_tree(batch)
        sheet = contact_sheet(to_pixels(batch.images[:leaves]), TREE_COLUMNS)
        sheet.save(images / f"tree-{step:06d}.png")
        write_atomically(images / f"tree-{step:06d}.json", json.dumps(table))

    def write_calibration(self, result: CalibrationResult) -> None:
        """Write psi and the rounds of the calibration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "calibration.json", json.dumps(result.as_dict()))


def watch_values(
    evaluation: Evaluation, guidance: float, base: Mapping[str, Difference]
) -> dict[str, Any]:
    """What the record of an evaluation contains for the watch. Numbers that are NaN become null."""
    monitors = {
        name: [float(v) if math.isfinite(v) else None for v in column]
        for name, column in evaluation.monitors.items()
    }
    values: dict[str, Any] = {"guidance_scale": guidance, "monitors": monitors}
    if base:
        values["base"] = {
            name: {k: v if math.isfinite(v) else None for k, v in asdict(difference).items()}
            for name, difference in base.items()
        }
    return values


def _first_tree(batch: RolloutBatch) -> tuple[dict[str, Any], int]:
    """The tree of the first prompt as plain values, and its number of leaves."""
    tree = batch.tree
    rows = int((tree.prompt == 0).sum())  # the rows of the first prompt come first
    leaves = tree.leaves[tree.leaves < rows]
    edges = batch.credited[batch.credited < rows]
    of_first = tree.image < rows
    values = {
        "step": batch.step,
        "prompt": batch.prompts[0].text,
        "num_steps": tree.num_steps,
        "parent": tree.parent[:rows].tolist(),
        "grid_index": tree.grid_index[:rows].tolist(),
        "stochastic": tree.stochastic[:rows].tolist(),
        "leaves": leaves.tolist(),
        "image": tree.image[of_first].tolist(),
        "channel": tree.channel[of_first].tolist(),
        "rewards": {
            name: [float(v) for v in scores.values[: len(leaves)]]
            for name, scores in batch.scores.items()
        },
        "edges": edges.tolist(),
        "advantage": [float(v) for v in batch.advantage[: len(edges)]],
    }
    return values, len(leaves)


def _json(line: Metrics) -> str:
    """One line of JSON. Numbers that are not finite become null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }
    return json.dumps(finite, allow_nan=False)


def _open_logger(kind: str, folder: Path, config: Config) -> Callable[[Metrics], None]:
    """A function that logs one line of metrics.

    Raises:
        SettingsError: the library of the logger is not installed.
    """
    try:
        return _tensorboard(folder) if kind == "tensorboard" else _wandb(folder, config)
    except ImportError as error:
        raise SettingsError(
            f"runtime.loggers: {kind} is not installed ({error}). Run pip install {kind}."
        ) from error


def _tensorboard(folder: Path) -> Callable[[Metrics], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(line: Metrics) -> None:
        for name, value in line.items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return log


def _wandb(folder: Path, config: Config) -> Callable[[Metrics], None]:
    import wandb

    settings = config.to_dict()
    run = wandb.init(project="flowgrain", name=config.name, dir=str(folder), config=settings)
    return lambda line: run.log(line, step=line["step"])
