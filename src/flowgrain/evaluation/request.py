"""The request of an evaluation, and the record of it in the output directory."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowgrain.config.load import parse_overrides
from flowgrain.config.schema import Config
from flowgrain.data import Prompt
from flowgrain.evaluation.targets import Target, base_config, find_targets
from flowgrain.records.files import write_atomically
from flowgrain.rewards import Explains, Reward
from flowgrain.settings import SettingsError, one_line
from flowgrain.yaml_text import check_yaml

RECORD = "evaluation.yaml"
_SECTIONS = ("model", "sampling", "rewards", "evaluation", "data", "runtime")
"""Sections that affect an evaluation."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate: every target at every number of inference steps with every seed.

    Attributes:
        targets: the models. Differences are computed to the first model.
        config: prompts, rewards and sampling settings, see `base_config`.
        overrides: nested values. They also replace settings of targets that are runs.
        steps: numbers of ODE steps.
        seeds: seeds of the initial noise. Every seed is one image per prompt.
        keep_images: whether to save every image.
        retry_failed: whether to recompute results that contain unscored images.
    """

    targets: tuple[Target, ...]
    config: Config
    overrides: Mapping[str, Any]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    keep_images: bool = False
    retry_failed: bool = False

    def __post_init__(self) -> None:
        for option, values in (("--steps", self.steps), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                text = ",".join(map(str, values))
                raise SettingsError(
                    f"{option} {text}: give one or more numbers, each of them once."
                )

    @property
    def default_directory(self) -> Path:
        """evaluations/LABEL-HASH. The hash covers the overrides and the models."""
        content = [_sorted(self.overrides), [target.identity for target in self.targets]]
        digest = hashlib.sha256(repr(content).encode()).hexdigest()[:8]
        return Path("evaluations") / f"{self.targets[-1].label}-{digest}"


def make_request(
    words: Sequence[str],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    steps: Sequence[int] = (16,),
    seeds: Sequence[int] = (0,),
    keep_images: bool = False,
    retry_failed: bool = False,
) -> EvaluationRequest:
    """The request to evaluate the models that `words` name.

    Args:
        words: the models, see `find_targets`.
        overrides: "section.key=VALUE" words, or a mapping of full paths to values. They apply to
            all models.
        steps: numbers of ODE steps.
        seeds: seeds of the initial noise.
        keep_images: whether to save every image.
        retry_failed: whether to recompute results that contain unscored images.

    Raises:
        SettingsError: a word names no model, or an override is wrong or has no effect.

    Example:
        >>> make_request(["base", "runs/demo"], ["evaluation.num_prompts=64"], steps=[10, 16])
    """
    nested = parse_overrides(overrides)
    for section in nested:
        if section not in _SECTIONS and section in Config.model_fields:
            raise SettingsError(f"{section}: has no effect on an evaluation. Remove this override.")
    replaced_by = (("evaluation", "num_steps", "--steps"), ("runtime", "seed", "--seeds"))
    for section, key, option in replaced_by:
        if key in (nested.get(section) or {}):
            raise SettingsError(
                f"{section}.{key}={nested[section][key]}: has no effect on an evaluation. "
                f"Use {option}."
            )
    targets = find_targets(words)
    if not targets:
        raise SettingsError("There is no model to evaluate. Name one, such as base or runs/demo.")
    return EvaluationRequest(
        targets=tuple(targets),
        config=base_config(targets, nested),
        overrides=nested,
        steps=tuple(steps),
        seeds=tuple(seeds),
        keep_images=keep_images,
        retry_failed=retry_failed,
    )


def record_request(
    request: EvaluationRequest,
    folder: Path,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    given: Sequence[str] = (),
) -> None:
    """Write the record of `request` to `folder`, or check that an existing record agrees with it.

    Args:
        request: the request. Its models are added to the models in the record.
        folder: output directory.
        prompts: all prompts.
        rewards: all rewards.
        given: names of the arguments of `run_evaluation` that replace settings.

    Raises:
        SettingsError: the directory contains results of other prompts, rewards, settings or
            weights.
    """
    record = {
        "prompts": _prompts_digest(prompts),
        "metrics": list(rewards),
        "overrides": _sorted(request.overrides),
        "settings": _sampling_settings(request.config),
        "given": list(given),
        "mean_of_parts": [
            name
            for name, reward in rewards.items()
            if isinstance(reward, Explains) and reward.mean_of_parts
        ],
    }
    models = {target.label: target.identity for target in request.targets}
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--out {folder}: is a file. Give a directory.")
    if (folder / RECORD).exists():
        models = _check_record(folder, record, models)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**record, "models": models}, sort_keys=False)
    write_atomically(folder / RECORD, text)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of the evaluation in `folder`.

    Raises:
        SettingsError: there is no record, or it cannot be read.
    """
    file = folder / RECORD
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(text)
        record = yaml.safe_load(text)
        if not isinstance(record, dict) or not isinstance(record.get("models"), dict):
            raise ValueError("it lists no models")
        for name in ("metrics", "mean_of_parts"):
            if not isinstance(record.get(name), list):
                raise ValueError(f"it has no list of {name}")
        if not isinstance(record.get("settings"), dict) or "model" not in record["settings"]:
            raise ValueError("it has no settings")
    except FileNotFoundError:
        raise SettingsError(f"{folder}: contains no evaluation (no {RECORD}).") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = one_line(error)
        raise SettingsError(f"{file}: cannot be read ({reason}). Use another directory.") from None
    return record


def _check_record(
    folder: Path, record: Mapping[str, Any], models: Mapping[str, str]
) -> dict[str, str]:
    """The models of the existing record and the new models. Checks that the records agree."""
    existing = read_record(folder)
    for name, value in record.items():
        if existing.get(name) != value:
            raise SettingsError(
                f"--out {folder}: contains an evaluation with other {name}. Use another directory."
            )
    known: dict[str, str] = existing["models"]
    for label, identity in models.items():
        if known.get(label, identity) != identity:
            raise SettingsError(
                f"--out {folder}: the weights of {label} have changed since they were evaluated. "
                "Use another directory."
            )
    return {**known, **models}


def _prompts_digest(prompts: Sequence[Prompt]) -> str:
    content = repr([(prompt.text, dict(prompt.fields)) for prompt in prompts])
    return hashlib.sha256(content.encode()).hexdigest()


def _sampling_settings(config: Config) -> dict[str, Any]:
    """The settings that determine the images of a model that is not a run, and their scores."""
    values = config.to_dict()
    model = {
        name: values["model"][name] for name in ("name", "path", "revision", "height", "width")
    }
    grid = ("grid", "shift", "shift_terminal", "sigma_min")
    sampling = {name: values["sampling"][name] for name in grid}
    return {
        "model": model,
        "sampling": {**sampling, "guidance_scale": config.eval_guidance},
        "runtime": {"dtype": values["runtime"]["dtype"]},
        "rewards": [
            {key: value for key, value in reward.items() if key not in ("weight", "batch_size")}
            for reward in (*values["rewards"], *values["evaluation"]["rewards"])
        ],
    }


def _sorted(values: Any) -> Any:
    """`values` with the keys of all mappings in alphabetical order."""
    if isinstance(values, Mapping):
        return {key: _sorted(values[key]) for key in sorted(values)}
    return [_sorted(value) for value in values] if isinstance(values, list | tuple) else values
