"""The files of a run: run.yaml, metrics.jsonl, evaluations/ and groups/."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowgrain.config.schema import Config
from flowgrain.methods.calibration import CalibrationResult
from flowgrain.records.alarms import append_alarms
from flowgrain.records.damaged import set_damaged_files_aside, set_damaged_lines_aside
from flowgrain.records.evaluations import (
    EVALUATION_IMAGES,
    evaluation_name,
    write_evaluation_images,
)
from flowgrain.records.files import write_atomically
from flowgrain.records.json_text import to_json
from flowgrain.records.metrics import read_metrics
from flowgrain.settings import SettingsError
from flowgrain.training.alarms import Difference
from flowgrain.training.evaluate import Evaluation
from flowgrain.training.groups import GroupWriter, to_image
from flowgrain.training.rollout_batch import Metrics, RolloutBatch
from flowgrain.training.run_files import forget_checkpoints, record_settings, write_run
from flowgrain.training.trackers import Trackers, open_trackers
from flowgrain.training.watch_files import discard_after

log = logging.getLogger(__name__)

_PARTS = ("evaluations", "groups")
"""Directories with files of a step."""
_OF_STEP = re.compile(r"[a-z-]+-(\d{6,})\.(?:json|zip)")
"""Name of a file of a step in these directories, also of a damaged file."""


class Recorder:
    """Writes the files of a run.

    Args:
        folder: directory of the run.
        config: settings.
        given: names of the Trainer's arguments that replace settings, such as "rewards".
    """

    def __init__(self, folder: Path, config: Config, given: Sequence[str] = ()) -> None:
        self.folder, self.config, self.given = folder, config, list(given)
        self.groups = GroupWriter(folder / "groups", config)
        self._resumed = False
        self._recorded = False
        self._first_step: int | None = None
        self.trackers = Trackers()

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
            SettingsError: the directory contains a run that is not being resumed.
        """
        self.check()
        for part in ("checkpoints", *_PARTS):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        if not self._resumed:
            forget_checkpoints(self.folder)
        if not (self._resumed and (self.folder / "run.yaml").exists()):
            write_run(self.folder, self.config, self.given)
        (self.folder / "metrics.jsonl").touch()
        self.trackers = open_trackers(self.config, self.folder, self._first_step)

    def write_metrics(self, line: Metrics) -> None:
        """Append a line to metrics.jsonl and flush it to the disk.

        The first training step records the settings in run.yaml.
        """
        if not self._recorded and line["step"] > 0:
            record_settings(self.folder, self.config, self.given, line["step"])
            self._recorded = True
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.trackers.scalars(line)

    def read_metrics(self) -> list[Metrics]:
        """All lines of metrics.jsonl, without damaged lines."""
        return read_metrics(self.folder)

    def replace_last(self, line: Metrics) -> None:
        """Replace the last line of metrics.jsonl by `line`."""
        *before, last = self.read_metrics()
        text = "".join(to_json(m) + "\n" for m in [*before, line])
        write_atomically(self.folder / "metrics.jsonl", text)
        new = {name: value for name, value in line.items() if name not in last}
        self.trackers.scalars({"step": line["step"], **new})

    def metrics_text(self) -> str:
        """The lines of metrics.jsonl, for a checkpoint."""
        return "".join(to_json(line) + "\n" for line in self.read_metrics())

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
        self._first_step = step + 1 if step else 0  # step 0 is evaluated again
        file = self.folder / "metrics.jsonl"
        messages = set_damaged_lines_aside(file)
        if file.exists() or metrics:
            write_atomically(file, metrics if step > 0 else "")
        for part in ("", *_PARTS):
            for path in (self.folder / part).glob(".*.tmp"):  # incomplete files
                path.unlink()
        for part in _PARTS:
            for path in (self.folder / part).glob("*-[0-9]*"):
                of_step = _OF_STEP.fullmatch(path.name)  # other files are not of the run
                if of_step and int(of_step[1]) > (step or -1):
                    path.unlink()
        discard_after(self.folder, step)
        return messages + set_damaged_files_aside(self.folder)

    def write_evaluation(
        self, step: int, evaluation: Evaluation, base: Mapping[str, Difference]
    ) -> None:
        """Write the scores and monitors of all images, and the first images.

        Args:
            step: training step.
            evaluation: the evaluation.
            base: paired differences to the base model by reward and monitor. Empty: not written.
        """
        values: dict[str, Any] = {
            "step": step,
            "num_steps": evaluation.num_steps,
            "prompts": [prompt.text for prompt in evaluation.prompts],
            "scores": {k: [float(v) for v in values] for k, values in evaluation.scores.items()},
            "parts": evaluation.part_means(),
            "guidance_scale": self.config.eval_guidance,
            "monitors": {
                k: [float(v) for v in column] for k, column in evaluation.monitors.items()
            },
        }
        if base:
            values["base"] = {name: asdict(difference) for name, difference in base.items()}
        folder = self.folder / "evaluations"
        images = (to_image(image) for image in evaluation.images[:EVALUATION_IMAGES].cpu())
        write_evaluation_images(folder, step, images)
        write_atomically(folder / evaluation_name(step), to_json(values))
        self.trackers.evaluation(step, evaluation)

    def write_groups(self, batch: RolloutBatch, sigmas: list[float]) -> None:
        """Start to write the groups of a training step, see `GroupWriter`.

        Args:
            batch: the step.
            sigmas: [T + 1] noise levels of the grid.

        Raises:
            OSError: the step before could not be written.
        """
        self.groups.write(batch, sigmas)
        self.trackers.group(batch, sigmas)

    def write_alarms(self, alarms: Sequence[Mapping[str, Any]]) -> None:
        """Append the alarms of an evaluation to alarms.jsonl, and pass them to the trackers."""
        if alarms:
            append_alarms(self.folder, alarms)
        for alarm in alarms:
            self.trackers.alarm(alarm)

    def finish(self) -> None:
        """Wait until all records are on the disk.

        Raises:
            OSError: a record could not be written.
        """
        self.groups.wait()

    def close(self) -> None:
        """Like `finish`, for a run that ends with an error: another error is only logged."""
        try:
            self.groups.wait()
        except OSError as error:
            log.warning(
                "%s: the groups of the last step could not be written: %s", self.folder, error
            )
        self.trackers.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. All records are on the disk.

        Raises:
            OSError: a record could not be written.
        """
        self.groups.wait()
        return {"groups": self.groups.retention.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Restore `state_dict` of training step `step`. Earlier versions have an empty state."""
        if "groups" in state:
            self.groups.load_state_dict(state["groups"], step)

    def write_calibration(self, result: CalibrationResult) -> None:
        """Write psi and the rounds of the calibration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "calibration.json", json.dumps(result.as_dict()))
