"""The models of an evaluation: finds them by the words of the command line, and loads them."""

import copy
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

from flowgrain.config.load import DEFAULT, merge, read_source, validate, with_defaults
from flowgrain.config.schema import Config
from flowgrain.models import BACKBONES, Backbone
from flowgrain.records.run_yaml import read_run
from flowgrain.settings import SettingsError
from flowgrain.training import checkpoint
from flowgrain.training.export import load_export
from flowgrain.training.load import compute_device, load_model
from flowgrain.training.policy import Policy
from flowgrain.training.run_files import last_step, read_run_config
from flowgrain.training.state import kept_settings

log = logging.getLogger(__name__)
BASE = "base"
TargetKind = Literal["base", "run", "lora", "transformer"]


@dataclass(frozen=True)
class Target:
    """A model to evaluate.

    Attributes:
        label: name in tables and file names.
        path: directory or file of the weights, or the name of a backbone.
        kind: "base" is a backbone without changes, "run" a run of flowgrain, "lora" and
            "transformer" are exported weights.
        identity: text that changes when the weights change.
        checkpoint: checkpoint of a run to evaluate. None: the run was not trained yet, and its base
            model is evaluated.
    """

    label: str
    path: str
    kind: TargetKind
    identity: str
    checkpoint: Path | None = None


def find_targets(words: Sequence[str]) -> list[Target]:
    """The models that `words` name, with distinct labels.

    Args:
        words: "base", the name of a backbone, the directory of a run, the directory of an export
            or its subdirectory lora or transformer, or a LoRA file.

    Raises:
        SettingsError: a word names no model, two words name the same model, or the checkpoints of
            a run are gone.
        CheckpointError: all checkpoints of a run are damaged.
    """
    found = [_find_target(word) for word in words]
    for number, target in enumerate(found):
        if any(_same_model(target, earlier) for earlier in found[:number]):
            raise SettingsError(f"{target.path}: named twice. Name every model once.")
    labels = [target.label for target in found]
    return [
        replace(target, label=_distinct_label(target)) if labels.count(target.label) > 1 else target
        for target in found
    ]


def _same_model(one: Target, other: Target) -> bool:
    return (one.kind, one.identity) == (other.kind, other.identity)


def _distinct_label(target: Target) -> str:
    digest = hashlib.sha256(target.identity.encode()).hexdigest()[:6]
    return f"{_file_name(target.path).strip('-')}-{digest}"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text)


def _find_target(word: str) -> Target:
    if word == BASE or word in BACKBONES:
        name = BACKBONES.find(word) or word
        return Target(name, name, "base", name)
    path = Path(word).expanduser()
    target = _run_target(path) if (path / "run.yaml").exists() else _export_target(path)
    if target is None:
        raise SettingsError(
            f"{word}: there is no such model. Give the directory of a run or of an export, a LoRA "
            f"file, {BASE}, or a backbone: {', '.join(BACKBONES)}."
        )
    return target


def _run_target(path: Path) -> Target:
    try:
        newest, _, damaged = checkpoint.load_last_good(path / "checkpoints")
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{error}{or_export(path)}") from error
    for message in damaged:
        log.warning("%s. An earlier checkpoint is evaluated.", message)
    trained = last_step(path) if newest is None else checkpoint.step_of(newest)
    if newest is None and trained > 0:
        raise SettingsError(
            f"{path}: trained to step {trained}, but it has no checkpoint. Restore "
            f"{path / 'checkpoints'}{or_export(path) or ', or name an export.'} "
            f"For the untrained model, use {BASE}."
        )
    if trained == 0:
        log.warning("%s: not trained yet. The base model is used.", path)
    folder = path.resolve()
    step = newest.name if newest is not None else "step-0"
    return Target(folder.name, str(path), "run", f"{folder} {step}", newest)


def or_export(run: Path) -> str:
    """The end of a sentence about lost checkpoints of a run: use its export. Empty without one."""
    export = run / "export"
    return f", or use its export {export}." if _export_target(export) is not None else ""


def _export_target(path: Path) -> Target | None:
    """The export at `path`: a LoRA file, a directory of weights, or its parent directory."""
    folders: tuple[tuple[str, TargetKind], ...] = (
        ("lora", "lora"),
        ("transformer", "transformer"),
        ("", "lora"),
        ("", "transformer"),
    )
    for part, kind in folders:
        folder = path / part
        if folder.is_dir():
            files = sorted(folder.glob("*.safetensors"))
        else:
            files = [path] if path.suffix == ".safetensors" and path.is_file() else []
        is_transformer = (folder / "config.json").exists()
        if files and is_transformer == (kind == "transformer"):
            stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            weights = folder if path.is_dir() else path
            return Target(_export_label(path), str(weights), kind, f"{path.resolve()} {stamps}")
    return None


def _export_label(path: Path) -> str:
    """The name of the directory that contains the export, or of the LoRA file."""
    full = path.resolve()
    if path.suffix == ".safetensors":
        return _file_name(full.stem)
    parts = ("export", "lora", "transformer")
    return _file_name(next(p.name for p in (full, *full.parents) if p.name not in parts))


def base_config(targets: Sequence[Target], overrides: Mapping[str, Any]) -> Config:
    """The settings of all targets that are not runs: model, prompts, rewards and sampling.

    They are the settings of the first run among the targets. Without a run, they are the defaults
    of the backbone.

    Args:
        targets: the models of the evaluation.
        overrides: nested values, as `parse_overrides` returns them.

    Raises:
        SettingsError: an override is wrong.
    """
    run = next((target for target in targets if target.kind == "run"), None)
    if run is not None:
        return read_run_config(Path(run.path), dict(overrides))
    demo = read_source(DEFAULT)[1]
    demo.pop("recipe", None)
    named = next((target.path for target in targets if target.path in BACKBONES), None)
    chosen = {"model": {"name": named}} if named is not None else {}
    values = merge(chosen, overrides)
    demo_model = demo.get("model", {}).get("name", "shapes")
    if values.get("model", {}).get("name", demo_model) != demo_model:
        demo = {"method": {"name": demo["method"]["name"]}}  # required, but not used
    return validate(merge(with_defaults(merge(demo, values)), values))


def load_target(
    target: Target,
    base: Config,
    overrides: Mapping[str, Any],
    backbone: Backbone | None = None,
) -> tuple[Policy, Config]:
    """A policy for sampling with the weights of `target`, and the settings to sample with.

    A run is loaded with the EMA of its parameters if it has one.

    Args:
        target: the model.
        base: settings of targets that are not runs, see `base_config`.
        overrides: nested values that replace settings of a run.
        backbone: a backbone from Python, in place of the backbone in the settings. It is not
            changed: the weights are loaded into a deep copy.

    Raises:
        SettingsError: the weights do not fit the model, or an override changes a setting that the
            run must keep.
    """
    given = copy.deepcopy(backbone)
    if target.kind == "run":
        return _load_run(target, overrides, given)
    config = base.with_changes({"model.name": target.path}) if target.path in BACKBONES else base
    model = given or load_model(config, train=False)
    if target.kind != "base":
        load_export(model, Path(target.path), target.kind)
    config = config.with_grid_of(model)
    return Policy.for_sampling(config, model, compute_device(config.runtime.device)), config


def _load_run(
    target: Target, overrides: Mapping[str, Any], given: Backbone | None
) -> tuple[Policy, Config]:
    folder = Path(target.path)
    config = run_config(folder, overrides)
    if given is None and "backbone" in read_run(folder).get("given", []):
        raise SettingsError(
            f"{folder}: this run was started from Python with its own backbone. Evaluate it from "
            "Python: run_evaluation(request, directory, backbone=...)."
        )
    model = given or load_model(config, train=False)
    device = compute_device(config.runtime.device)
    policy = Policy.for_sampling(config, model, device, adapter=config.lora.rank > 0)
    if target.checkpoint is not None:
        policy.load_for_sampling(target.checkpoint)
    return policy, config


def run_config(folder: Path, overrides: Mapping[str, Any]) -> Config:
    """The settings of a run with `overrides`.

    Raises:
        SettingsError: an override changes a setting that the run must keep.
    """
    config = read_run_config(folder, dict(overrides))
    own, new = read_run_config(folder).to_dict(), config.to_dict()
    for path in kept_settings(config):
        keys = path.split(".")
        trained, value = (reduce(getitem, keys, values) for values in (own, new))
        if value != trained:
            raise SettingsError(
                f"{path}={value}: the run {folder} was trained with {path}={trained}. "
                "Remove this override."
            )
    return config
