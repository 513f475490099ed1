"""The files run.yaml (settings, versions and arguments of a run) and metrics.jsonl."""

import contextlib
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from flowgrain.config.load import load_config, read_yaml
from flowgrain.config.schema import Config
from flowgrain.settings import SettingsError
from flowgrain.training.files import write_atomically

_PACKAGES = ("flowgrain", "torch", "diffusers", "transformers", "peft", "numpy")


def write_run(folder: Path, config: Config, given: Sequence[str]) -> None:
    """Write `folder`/run.yaml.

    Args:
        folder: directory of the run.
        config: settings.
        given: names of the Trainer's arguments that replace settings, such as "rewards".
    """
    values = {"config": config.to_dict(), "given": list(given), **describe_environment()}
    write_atomically(folder / "run.yaml", yaml.safe_dump(values, sort_keys=False))


def read_run(path: Path) -> dict[str, Any]:
    """The content of a run's run.yaml.

    Raises:
        SettingsError: there is no readable run.yaml.
    """
    file = path / "run.yaml" if path.is_dir() else path
    if not file.exists():
        raise SettingsError(f"{path}: not the directory of a run. It has no run.yaml.")
    return read_yaml(file)


def read_run_config(
    path: Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    plugins: Iterable[str | Path] = (),
) -> Config:
    """The settings of a run, with overrides.

    Raises:
        SettingsError: there are no settings, another version wrote them, or an override is not
            valid.
    """
    read_run(path)
    return load_config(Path(path), overrides, plugins=plugins)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl. Empty if there is no such file.

    A last line that a kill truncated is left out.
    """
    file = folder / "metrics.jsonl"
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            values = json.loads(text).items()
            lines.append({key: math.nan if value is None else value for key, value in values})
    return lines


def describe_environment() -> dict[str, Any]:
    """Versions, threads and git revision."""
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


def _git_revision(folder: Path) -> str | None:
    """The commit that this package runs from. None without git or outside of a repository."""

    def git(*words: str) -> str:
        command = ["git", *words]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        tracked = git("ls-files", "--error-unmatch", "__init__.py")
        return (git("rev-parse", "HEAD") or None) if tracked else None
    except OSError:
        return None
