"""The files run.yaml (settings, versions and arguments of a run) and metrics.jsonl."""

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from flowgrain.config.load import load_config
from flowgrain.config.schema import Config
from flowgrain.records.files import write_atomically
from flowgrain.records.metrics import read_metrics
from flowgrain.records.run_yaml import read_run

_SAVED = ".saved"
"""Empty file in the directory of a run that has written a checkpoint."""
_PACKAGES = ("flowgrain", "torch", "diffusers", "transformers", "peft", "numpy")


def write_run(folder: Path, config: Config, given: Sequence[str]) -> None:
    """Write `folder`/run.yaml for a run that starts.

    Args:
        folder: directory of the run.
        config: settings.
        given: names of the Trainer's arguments that replace settings, such as "rewards".
    """
    _write(folder, _record(config, given), [])


def record_settings(folder: Path, config: Config, given: Sequence[str], first_step: int) -> None:
    """Record in `folder`/run.yaml that the steps from `first_step` on use these settings.

    `history` of the file lists what changed, and the first step with the change:
    {"first_step": 41, "changed": {"config.optimizer.learning_rate": [1e-4, 5e-5]}}. Changes for
    steps that a resumed run trains again are dropped. The file is only written if it changes.
    """
    new, history = _record(config, given), []
    saved = read_run(folder) if (folder / "run.yaml").exists() else {}
    if first_step > 1 and saved:
        history = list(saved.get("history", []))
        old = _flat({key: value for key, value in saved.items() if key != "history"})
        while history and history[-1]["first_step"] >= first_step:
            old |= {path: values[0] for path, values in history.pop()["changed"].items()}
        now = _flat(new)
        paths = dict.fromkeys([*old, *now])
        changed = {p: [old.get(p), now.get(p)] for p in paths if old.get(p) != now.get(p)}
        if changed:
            history.append({"first_step": first_step, "changed": changed})
    if saved != {**new, "history": history}:
        _write(folder, new, history)


def _record(config: Config, given: Sequence[str]) -> dict[str, Any]:
    title = config.method.title or config.method.name  # a reader of the file has no methods
    values = {"config": config.to_dict(), "title": title, "given": list(given)}
    return {**values, **describe_environment()}


def _write(folder: Path, record: Mapping[str, Any], history: Sequence[Any]) -> None:
    values = {**record, "history": list(history)}
    text = yaml.dump(values, Dumper=_WithoutAliases, sort_keys=False)
    write_atomically(folder / "run.yaml", text)


class _WithoutAliases(yaml.SafeDumper):
    """Writes a value that occurs twice in full, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def remember_checkpoints(folder: Path) -> None:
    """Record that the run in `folder` has written a checkpoint."""
    (folder / _SAVED).touch()


def forget_checkpoints(folder: Path) -> None:
    """Record that the run in `folder` starts at step 0."""
    (folder / _SAVED).unlink(missing_ok=True)


def had_checkpoints(folder: Path) -> bool:
    """Whether the run in `folder` has written a checkpoint."""
    return (folder / _SAVED).exists()


def resume_command(
    folder: Path, given: Sequence[str], changes: Mapping[str, str] | None = None
) -> str:
    """How to resume the run in `folder`: a command, or Python for a run with custom objects.

    Args:
        folder: directory of the run.
        given: names of the Trainer's arguments that replace settings.
        changes: changed settings by full path.
    """
    changes = changes or {}
    if not given:
        words = [f"{name}={value}" for name, value in changes.items()]
        return " ".join([f"flowgrain train --resume {folder}", *words])
    changed = ", ".join(f"{name!r}: {value}" for name, value in changes.items())
    config = f"config.with_changes({{{changed}}})" if changes else "config"
    arguments = ", ".join([config, repr(str(folder)), *(f"{name}=..." for name in given)])
    return f"Trainer({arguments}) in Python: call resume(), then train()"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by full path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


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


def last_step(folder: Path) -> int:
    """The last step in a run's metrics.jsonl or in the history of its run.yaml. 0: not trained."""
    history = read_run(folder).get("history")
    entries = history if isinstance(history, list) else []
    firsts = [entry.get("first_step") for entry in entries if isinstance(entry, dict)]
    steps = [line["step"] for line in read_metrics(folder)]
    return max([*steps, *(first - 1 for first in firsts if isinstance(first, int))], default=0)


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
