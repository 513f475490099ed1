"""Trackio: a local database, or a server if the user has chosen one."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from flowgrain.training.trackers.base import PROJECT, ImageTable, TrackedRun, import_library


class Trackio:
    """Writes a run of Trackio. A resumed run continues it.

    Trackio finds a run by its name, so the name contains the identity of the run.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._library = import_library("trackio")
        self._id = run.id
        self._run = self._library.init(
            project=PROJECT,
            name=f"{run.name}-{run.id}",
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def images(self, name: str, table: ImageTable) -> None:
        rows = [
            [self._library.Image(Image.fromarray(pixels)), *row]
            for pixels, row in zip(table.images, table.rows, strict=True)
        ]
        content = self._library.Table(columns=["image", *table.columns], data=rows)
        self._run.log({name: content}, step=table.step)

    def alarm(self, step: int, title: str, message: str) -> None:
        self._run.alert(title, text=message, level=self._library.AlertLevel.WARN, step=step)

    def artifact(self, folder: Path) -> None:
        artifact = self._library.Artifact(f"export-{self._id}", type="model")
        artifact.add_dir(folder)
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()
