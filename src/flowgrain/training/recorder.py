"""What a run leaves in its folder: run.yaml, metrics.jsonl, evaluations/, images/ and report.html."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flowgrain.methods.calibration import Calibration
from flowgrain.training.checkpoint import write_atomically
from flowgrain.training.evaluate import Evaluation
from flowgrain.config.schema import Settings, SettingsError, settings
from flowgrain.core.tree import Ints, Tree

SHOWN = 24  # images kept of an evaluation
_PACKAGES = ("flowgrain", "torch", "diffusers", "transformers", "peft", "numpy")


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Images [I, 3, H, W] in 0..1 as bytes [I, H, W, 3]."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(pixels: NDArray[np.uint8], columns: int) -> Image.Image:
    """Tiles [I, H, W, 3] row by row on one picture, unscaled."""
    count, h, w, _ = pixels.shape
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, h, w, 3), dtype=np.uint8)
    sheet[:count] = pixels
    return Image.fromarray(sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3))


def enlarged(image: Image.Image, tile: int, least: int = 128) -> Image.Image:
    """`image` made of tiles `tile` pixels wide, enlarged by a whole number so that a tile is at least `least` wide."""
    factor = max(1, math.ceil(least / tile))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def describe_environment() -> dict[str, Any]:
    """Versions, machine and git revision, for the record of a run."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "git_revision": _git_revision(Path(__file__).parent),
    }


def _git_revision(here: Path) -> str | None:
    """The commit this package was run from; None without git or where the package is not under version control."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    try:
        return (git("rev-parse", "HEAD") or None) if git("ls-files", "--error-unmatch", "__init__.py") else None
    except OSError:
        return None


def read_saved(path: Path) -> dict[str, Any]:
    """What run.yaml says, of a run's folder or the file itself. Raises SettingsError if there is nothing to read."""
    file = path / "run.yaml" if path.is_dir() else path
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError:
        raise SettingsError(f"{path}: there is no run here (no run.yaml)") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("settings", {}), dict) or not all(isinstance(k, str) for k in saved):
        raise SettingsError(f"{file}: not a file of settings; write a line `key: value` for each")
    return saved


def read_settings(path: Path, /, **changes: Any) -> Settings:
    """The settings saved in a run's folder or its run.yaml, with `changes`. Raises SettingsError if there are none."""
    saved = read_saved(path)
    return settings({**saved.get("settings", saved), **changes})


def _json(line: dict[str, Any]) -> str:
    """One line of JSON, with null for what is not a finite number."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}, allow_nan=False)


class Record:
    """The folder of a run."""

    def __init__(self, folder: Path, s: Settings, given: Sequence[str] = ()) -> None:
        self.folder = folder
        self.settings = s
        self.given = list(given)
        self._resumed = False
        self._loggers: list[Any] = []

    def start(self) -> None:
        """Makes the folder. Raises SettingsError if it already holds a run that is not being resumed."""
        if not self._resumed and (self.folder / "metrics.jsonl").exists():
            raise SettingsError(
                f"{self.folder} already holds a run; go on with it by `--resume {self.folder}`, or give another name or --out"
            )
        try:
            for part in ("checkpoints", "images", "evaluations"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise SettingsError(f"--out {self.folder}: cannot be made a run's folder ({error}); name another") from error
        self._loggers = [_open_logger(kind, self.folder, self.settings) for kind in self.settings.loggers]
        saved = {"settings": self.settings.model_dump(mode="json"), "given": self.given, **describe_environment()}
        write_atomically(self.folder / "run.yaml", yaml.safe_dump(saved, sort_keys=False))
        (self.folder / "metrics.jsonl").touch()

    def metrics(self, line: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl and flushes it to the disk."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for log in self._loggers:
            log(line)

    def read(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a last line that a kill cut short is left out."""
        lines = []
        for text in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append({key: math.nan if value is None else value for key, value in json.loads(text).items()})
        return lines

    def forget_after(self, step: int) -> None:
        """Drops what was written after `step`, which a resumed run writes again; from step 0 on everything."""
        self._resumed = True
        if (self.folder / "metrics.jsonl").exists():
            kept = [line for line in self.read() if 0 < line["step"] <= step or (line["step"] == 0 and step > 0)]
            write_atomically(self.folder / "metrics.jsonl", "".join(_json(line) + "\n" for line in kept))
        for part in ("", "evaluations", "images"):
            for path in (self.folder / part).glob(".*.tmp"):  # a kill came before it was whole
                path.unlink()
        for part in ("evaluations", "images"):
            for path in (self.folder / part).glob("*-[0-9]*"):
                if int(path.stem.split("-")[-1]) > (step or -1):
                    path.unlink()

    def keep_evaluation(self, step: int, found: Evaluation) -> None:
        """Writes the scores of every image and the first images."""
        saved = {
            "step": step,
            "num_steps": found.num_steps,
            "prompts": found.prompts,
            "scores": {name: [float(v) for v in values] for name, values in found.scores.items()},
            "parts": found.part_means(),
        }
        pixels = to_pixels(found.images[:SHOWN])
        enlarged(contact_sheet(pixels, 8), pixels.shape[2]).save(self.folder / "images" / f"evaluation-{step:06d}.png")
        write_atomically(self.folder / "evaluations" / f"step-{step:06d}.json", json.dumps(saved))

    def keep_tree(
        self, step: int, tree: Tree, prompt: str, images: Tensor, rewards: dict[str, Tensor], credited: Ints, advantage: Tensor
    ) -> None:
        """Writes the tree of the step's first prompt: table, images, rewards, advantages of the rows `credited`."""
        if (
            step != 1
            and step != self.settings.max_steps
            and not (self.settings.eval_every and step % self.settings.eval_every == 0)
        ):
            return
        first = int((tree.prompt == 0).sum())  # rows of the first prompt come first
        leaves = tree.leaves[tree.leaves < first]
        edges = credited[credited < first]
        of_first = tree.image < first
        table = {
            "step": step,
            "prompt": prompt,
            "num_steps": tree.num_steps,
            "parent": tree.parent[:first].tolist(),
            "level": tree.level[:first].tolist(),
            "stochastic": tree.stochastic[:first].tolist(),
            "leaves": leaves.tolist(),
            "image": tree.image[of_first].tolist(),
            "channel": tree.channel[of_first].tolist(),
            "rewards": {name: [float(v) for v in values[: len(leaves)]] for name, values in rewards.items()},
            "edges": edges.tolist(),
            "advantage": [float(v) for v in advantage[: len(edges)]],
        }
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        contact_sheet(to_pixels(images[: len(leaves)]), 16).save(self.folder / "images" / f"tree-{step:06d}.png")
        write_atomically(self.folder / "images" / f"tree-{step:06d}.json", json.dumps(table))

    def keep_calibration(self, found: Calibration) -> None:
        """Writes psi and the rounds that led to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "calibration.json", json.dumps(found.as_dict()))


def _open_logger(kind: str, folder: Path, s: Settings) -> Any:
    """A function that logs one line of metrics. Raises SettingsError if its library is not installed."""
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def log(line: dict[str, Any]) -> None:
                for name, value in line.items():
                    writer.add_scalar(name, value, line["step"])
                writer.flush()

            return log
        import wandb
    except ImportError as error:
        raise SettingsError(f"loggers={kind}: {error}; install it with `pip install {kind}`") from error
    run = wandb.init(project="flowgrain", name=s.name, dir=str(folder), config=s.model_dump(mode="json"))
    return lambda line: run.log(line, step=line["step"])
