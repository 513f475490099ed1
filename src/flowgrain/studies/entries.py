"""The runs of a comparison: their settings, their number of training steps, and their cost."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flowgrain.config import Config, load_config
from flowgrain.config.load import merge
from flowgrain.core.cost import Cost
from flowgrain.core.tree import Tree
from flowgrain.methods.calibration import calibration_cost
from flowgrain.methods.cost import num_updates
from flowgrain.planning.plan import prompt_cost
from flowgrain.settings import SettingsError
from flowgrain.studies.comparison import RESERVED, Comparison

_UNLIMITED_STEPS = 10**6


@dataclass(frozen=True)
class Entry:
    """A planned run of a comparison.

    Attributes:
        label: label of the method in the comparison.
        reward_set: label of the trained rewards.
        config: settings of the run.
        units: cost of training in `Cost.units`, with the calibration.
        passes: forward passes of training in `Cost.passes`, with the calibration.
        evaluation_passes: forward passes of all evaluations and of the final measurement.
    """

    label: str
    reward_set: str
    config: Config
    units: float
    passes: float
    evaluation_passes: int

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        name = f"{self.label}+{self.reward_set}+{self.config.runtime.seed}"
        return name.replace(" ", "_").replace("/", "_")


def plan_entries(comparison: Comparison) -> list[Entry]:
    """All runs of `comparison`, with their cost.

    All methods run with the first seed before any method runs with the second seed. The first
    results therefore cover all methods.

    Raises:
        SettingsError: a setting is wrong, two runs have the same name, or the budget is too small
            for one training step.
    """
    _check_reserved(comparison)
    configs = {
        (reward_set, label): _config(comparison, label, settings, reward_set)
        for reward_set in comparison.rewards
        for label, settings in _variants(comparison).items()
    }
    entries = [
        _entry(comparison, label, reward_set, _with_seed(config, seed))
        for seed in comparison.seeds
        for (reward_set, label), config in configs.items()
    ]
    name, count = Counter(entry.name for entry in entries).most_common(1)[0]
    if count > 1:
        raise SettingsError(
            f"Two runs have the name {name!r}. Use different methods, reward sets and seeds."
        )
    return entries


def _check_reserved(comparison: Comparison) -> None:
    """Raise SettingsError if a setting is given that the comparison determines for every run."""
    places = {"common": comparison.common, "overrides": comparison.overrides}
    places |= {f"methods.{label}": own for label, own in comparison.methods.items()}
    for place, settings in places.items():
        reserved = (*RESERVED, "method.name") if place in ("common", "overrides") else RESERVED
        for path in reserved:
            section, _, key = path.partition(".")
            value: Any = settings.get(section)
            if key:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                raise SettingsError(
                    f"{place}: {path}={value}: the comparison sets this for every run. "
                    "Change its methods, rewards, seeds or budget instead."
                )


def _variants(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Settings by label, for every method or for every method with every learning rate."""
    if not comparison.learning_rates:
        return comparison.methods
    return {
        f"{label} lr={rate:g}": merge(
            {"method": {"name": label}}, own, {"optimizer": {"learning_rate": rate}}
        )
        for label, own in comparison.methods.items()
        for rate in comparison.learning_rates
    }


def _config(
    comparison: Comparison, label: str, settings: Mapping[str, Any], reward_set: str
) -> Config:
    """The settings of a run, before its seed and its length are known."""
    rewards = [reward.model_dump(mode="json") for reward in comparison.rewards[reward_set]]
    usual = {"runtime": {"threads": 1}}
    fixed = {"name": "run", "rewards": rewards}
    values = merge(usual, comparison.common, settings, comparison.overrides, fixed)
    try:
        return load_config(str(values.get("method", {}).get("name", label)), values)
    except SettingsError as error:
        raise SettingsError(f"methods.{label}: {error}") from error


def _with_seed(config: Config, seed: int) -> Config:
    runtime = config.runtime.model_copy(update={"seed": seed})
    return config.model_copy(update={"runtime": runtime})


def _entry(comparison: Comparison, label: str, reward_set: str, config: Config) -> Entry:
    """The run with as many training steps as the budget pays for."""
    num_steps, num_rewards = config.sampling.num_steps, len(config.rewards)
    prompts = config.training.prompts_per_step
    calibration = calibration_cost(config.method, num_steps, num_rewards)
    units, passes = calibration.units, calibration.passes
    steps = updates = 0
    for cost, new_updates in _steps(config):
        if comparison.unit == "seconds" and steps == config.training.max_steps:
            break
        new_units = cost.units * prompts
        spent = {"passes": units + new_units, "updates": updates + new_updates, "seconds": 0}
        if spent[comparison.unit] > comparison.budget:
            break
        steps, units, updates = steps + 1, units + new_units, updates + new_updates
        passes += cost.passes * prompts
    if not steps:
        raise SettingsError(
            f"budget={comparison.budget:g}: too small for one training step of {label!r}. "
            f"Use at least {spent[comparison.unit]:,.0f} {comparison.unit}."
        )
    config = _with_length(comparison, config, steps)
    return Entry(
        label, reward_set, config, units, passes, _evaluation_passes(comparison, config, steps)
    )


def _steps(config: Config) -> Iterator[tuple[Cost, int]]:
    """The cost per prompt and the optimizer updates of training step 1, 2, 3, ..."""
    method, prompts = config.method, config.training.prompts_per_step
    prices: dict[Tree, tuple[Cost, int]] = {}
    tree = config.tree(1)
    for step in itertools.count(1):
        if step > 1 and method.plan_varies:
            tree = config.tree(step)
        if tree not in prices:
            cost = prompt_cost(config, step, tree)
            prices[tree] = cost, num_updates(method, tree, prompts)
        yield prices[tree]


def _with_length(comparison: Comparison, config: Config, steps: int) -> Config:
    """`config` with the length of training, and with evaluations and checkpoints spread over it."""
    in_seconds = comparison.unit == "seconds"
    points = comparison.curve_points
    training = {
        "max_steps": _UNLIMITED_STEPS if in_seconds else steps,
        "max_seconds": comparison.budget if in_seconds else None,
        "checkpoint_every": max(1, steps // 4),
    }
    evaluation = {"every": max(1, steps // points) if points else 0}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "evaluation": config.evaluation.model_copy(update=evaluation),
        }
    )


def _evaluation_passes(comparison: Comparison, config: Config, steps: int) -> int:
    """Forward passes of the evaluations during training and of the final measurement."""
    every, final = config.evaluation.every, comparison.measurement
    evaluations = 1 + -(-steps // every) if every else 0
    during = config.evaluation.num_prompts * config.evaluation.num_steps * evaluations
    return during + final.num_prompts * final.images_per_prompt * sum(final.num_steps)
