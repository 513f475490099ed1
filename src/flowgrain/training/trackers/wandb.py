"""Weights & Biases: files in the directory of the run, or a server if the user has chosen one."""

import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from flowgrain.training.trackers.base import (
    PROJECT,
    ImageTable,
    TrackedRun,
    import_library,
    wandb_mode,
)

FINISH_SECONDS = 240.0
"""Longest time for the upload at the end of an online run. The rest stays on the disk."""
_TITLE = 63
"""Longest title of an alarm."""


class Wandb:
    """Writes a run of wandb, in offline mode unless WANDB_MODE is set.

    wandb ignores steps that go back, as those of a resumed run do. So the training step is a metric
    of its own, and the x-axis of all others.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._library = import_library("wandb")
        self._id = run.id
        settings = {"console": "off", "silent": True, "reinit": "create_new"}
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings["finish_timeout"] = FINISH_SECONDS
        mode = wandb_mode()
        self._run = self._library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=run.id,
            dir=str(run.folder),
            config=dict(run.config),
            mode=mode,
            resume="allow" if mode == "online" else None,  # offline: not supported
            settings=self._library.Settings(**settings),
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def images(self, name: str, table: ImageTable) -> None:
        rows = [
            [self._library.Image(Image.fromarray(pixels)), *row]
            for pixels, row in zip(table.images, table.rows, strict=True)
        ]
        content = self._library.Table(columns=["image", *table.columns], data=rows)
        self._run.log({"step": table.step, name: content})

    def alarm(self, step: int, title: str, message: str) -> None:
        level = self._library.AlertLevel.WARN
        text = message if message.startswith("step ") else f"step {step}: {message}"
        self._run.alert(title=title[:_TITLE], text=text, level=level, wait_duration=0)

    def artifact(self, folder: Path) -> None:
        artifact = self._library.Artifact(f"export-{self._id}", type="model")
        # immutable: the files are read in place. Otherwise wandb would first copy all of them.
        artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()
