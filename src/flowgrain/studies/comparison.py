"""The specification of a comparison, and loading it from YAML."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, ValidationError

from flowgrain.config.load import (
    Values,
    merge,
    parse_overrides,
    read_yaml,
    with_absolute_plugins,
)
from flowgrain.config.sections import Rewards
from flowgrain.methods import METHODS
from flowgrain.registry import load_plugin
from flowgrain.settings import IntTuple, Section, Setting, SettingsError, did_you_mean

DEFAULT = "full"
RESERVED = (
    "name",
    "rewards",
    "runtime.seed",
    "training.max_steps",
    "training.max_seconds",
    "training.checkpoint_every",
    "evaluation.every",
)
"""Settings that a comparison determines for every run."""

_BUNDLED = files("flowgrain.studies").joinpath("comparisons")
_SETTINGS = ("common", "overrides")
"""Keys with settings of runs. They are merged with the keys of the extended comparison."""

Unit = Literal["passes", "updates", "seconds"]
Seed = Annotated[int, Field(ge=0)]
RewardSet = Annotated[Rewards, Field(min_length=1)]


class Measurement(Section):
    """Measurement of the model of a finished run."""

    num_steps: IntTuple = Setting(
        (10, 16, 20), "Numbers of inference steps to measure.", unit="steps", min_length=1
    )
    num_prompts: int = Setting(256, "Held-out prompts.", unit="prompts", ge=2)
    images_per_prompt: int = Setting(2, "Images per prompt.", unit="images", ge=2)


class Comparison(Section):
    """Methods x reward sets x seeds, each with the same budget. Create it with `load_comparison`.

    The settings of a run are `common`, then the settings of its method, then `overrides`. Later
    settings replace earlier ones.
    """

    name: str = Setting(
        ..., "Name. The default directory is comparisons/NAME.", pattern=r"^\w[\w.+-]*$"
    )
    methods: dict[str, dict[str, Any]] = Setting(
        ...,
        "Settings of each method by label. Without method.name, the label is the method's name.",
        min_length=1,
    )
    rewards: dict[str, RewardSet] = Setting(..., "Lists of trained rewards by label.", min_length=1)
    seeds: Annotated[tuple[Seed, ...], Strict(False)] = Setting(
        ..., "Seeds. Every seed is a run.", min_length=1
    )
    budget: float = Setting(..., "Budget of a run, in `unit`.", gt=0)
    unit: Unit = Setting(
        "passes",
        "Unit of the budget. passes: forward passes, decodes and reward calls. A pass with "
        "gradient counts three times.",
    )
    common: dict[str, Any] = Setting({}, "Settings of all runs.")
    overrides: dict[str, Any] = Setting({}, "Settings of all runs. They replace those of methods.")
    baselines: dict[str, str] = Setting(
        {}, "Baseline of a method, to which its difference is computed. Default: the first method."
    )
    learning_rates: Annotated[tuple[float, ...], Strict(False)] = Setting(
        (), "Learning rates. If set, every method runs with every learning rate."
    )
    measurement: Measurement = Setting(Measurement(), "Measurement of finished runs.")
    curve_points: int = Setting(
        4, "Evaluations during training, for the curves.", unit="evaluations", ge=0
    )


def load_comparison(
    source: str | Path = DEFAULT,
    *,
    methods: Sequence[str] | None = None,
    rewards: Sequence[Sequence[str]] | None = None,
    seeds: Sequence[int] | None = None,
    budget: float | None = None,
    unit: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    plugins: Iterable[str | Path] = (),
) -> Comparison:
    """The comparison that `source` names, with changes.

    Args:
        source: a bundled comparison, see `comparison_names`, or a YAML file.
        methods: labels of the comparison or names of methods, in place of the methods of `source`.
        rewards: reward sets as lists of names, in place of the reward sets of `source`.
        seeds: seeds, in place of the seeds of `source`.
        budget: budget of a run.
        unit: unit of the budget.
        overrides: settings of all runs as "section.key=VALUE", or by full path.
        plugins: Python files that register methods, rewards or backbones.

    Raises:
        SettingsError: the source does not exist, or a value is wrong.
    """
    values, known = _read(source)
    given = {"methods": methods, "seeds": seeds, "budget": budget, "unit": unit}
    values |= {key: value for key, value in given.items() if value is not None}
    if rewards is not None:
        values["rewards"] = _reward_sets(rewards)
    for key in _SETTINGS:
        values[key] = parse_overrides(values.get(key) or {})
    given_overrides = with_absolute_plugins(parse_overrides(overrides), Path.cwd())
    values["overrides"] = merge(values["overrides"], given_overrides)
    values["common"] = _with_plugins(values["common"], plugins)
    values["methods"] = _selected(values.get("methods"), known)
    try:
        return Comparison.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(error))) from None


def comparison_names() -> list[str]:
    """Names of the bundled comparisons."""
    names = (entry.name.removesuffix(".yaml") for entry in _BUNDLED.iterdir())
    return sorted(name for name in names if not name.startswith("_"))


def _read(source: str | Path, extended_by: tuple[str, ...] = ()) -> tuple[Values, Values]:
    """The values of a comparison, and its methods and the methods of extended comparisons.

    `extended_by` are the comparisons that extend this comparison, from the first to the last.
    """
    if str(source) in comparison_names():
        place = str(source)
        own = read_yaml(_BUNDLED.joinpath(f"{source}.yaml"))
    elif Path(source).is_file():
        file = Path(source).resolve()
        place = str(file)
        own = _with_plugins_of_file(read_yaml(file), file.parent)
    else:
        hint = did_you_mean(str(source), comparison_names())
        raise SettingsError(f"There is no comparison or file {str(source)!r}. {hint}")
    _reject_cycle("extends", place, extended_by)
    base: Values = {}
    known: Values = {}
    if "extends" in own:
        base, known = _read(own.pop("extends"), (*extended_by, place))
    methods = own.get("methods")
    if isinstance(methods, Mapping):  # an empty value keeps the settings of the extended comparison
        own["methods"] = {
            label: known.get(label) if m is None else m for label, m in methods.items()
        }
        known = {**known, **own["methods"]}
    merged = {key: merge(base.get(key) or {}, own.get(key) or {}) for key in _SETTINGS}
    return {**base, **own, **merged}, known


def _selected(methods: Any, known: Values) -> Any:
    """The settings of each method in `methods` by label, including the settings that it extends.

    A list names entries of `known`, or registered methods.
    """
    if isinstance(methods, Mapping):
        return {label: _resolved(label, methods) for label in methods}
    if not isinstance(methods, list | tuple):
        return methods
    chosen: Values = {}
    for word in map(str, methods):
        label = word if word in known else METHODS.find(word)
        if label is None:
            hint = did_you_mean(word, dict.fromkeys([*METHODS, *known]))
            raise SettingsError(f"methods: there is no method {word!r}. {hint}")
        if label in chosen:
            raise SettingsError(f"methods: {label!r} occurs twice. List every method once.")
        chosen[label] = _resolved(label, known) if label in known else {}
    return chosen


def _resolved(label: str, methods: Mapping[str, Any], extended_by: tuple[str, ...] = ()) -> Values:
    """The settings of `label`, on top of the settings of the label that it extends.

    `extended_by` are the labels that extend this label, from the first to the last.
    """
    _reject_cycle(f"methods.{label}.extends", label, extended_by)
    own = methods[label] or {}
    if not isinstance(own, Mapping):
        raise SettingsError(
            f"methods.{label}={own!r}: not a mapping. Write section: {{key: value}}."
        )
    own = dict(own)
    base = own.pop("extends", None)
    if base is None:
        return parse_overrides(own)
    if base not in methods:
        raise SettingsError(
            f"methods.{label}.extends={base}: there is no such label. "
            f"{did_you_mean(str(base), methods)}"
        )
    name = {"method": {"name": base}}
    return merge(name, _resolved(base, methods, (*extended_by, label)), parse_overrides(own))


def _reject_cycle(setting: str, name: str, extended_by: tuple[str, ...]) -> None:
    """Check that `name` does not extend itself.

    Raises:
        SettingsError: `name` is in `extended_by`. The message shows the cycle.
    """
    if name in extended_by:
        cycle = " -> ".join([*extended_by[extended_by.index(name) :], name])
        raise SettingsError(f"{setting}: {cycle} is a cycle. Remove one `extends` of this cycle.")


def _reward_sets(rewards: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Reward sets by label, such as "towers+preference"."""
    sets: dict[str, list[str]] = {}
    for names in rewards:
        label = "+".join(names)
        if label in sets:
            raise SettingsError(f"rewards: {','.join(names)} occurs twice. List every set once.")
        sets[label] = list(names)
    return sets


def _with_plugins_of_file(values: Values, folder: Path) -> Values:
    """The values of a comparison file in `folder`, with absolute paths of plugins."""

    def absolute(settings: Any) -> Any:
        if not isinstance(settings, Mapping):
            return settings
        return with_absolute_plugins(parse_overrides(settings), folder)

    values = {key: absolute(v) if key in _SETTINGS else v for key, v in values.items()}
    methods = values.get("methods")
    if isinstance(methods, Mapping):
        values["methods"] = {label: absolute(settings) for label, settings in methods.items()}
    return values


def _with_plugins(common: Values, plugins: Iterable[str | Path]) -> Values:
    """`common` with `plugins`, which are loaded, because they may register a compared method."""
    own = common.get("runtime", {}).get("plugins", [])
    paths = [*own, *(str(Path(path).expanduser().resolve()) for path in plugins)]
    for path in paths:
        load_plugin(path)
    return merge(common, {"runtime": {"plugins": list(dict.fromkeys(paths))}}) if paths else common


def _explain(error: ValidationError) -> Iterable[str]:
    """One message per wrong value of a comparison."""
    for detail in error.errors():
        path = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            keys = [
                *Comparison.model_fields,
                *(f"measurement.{k}" for k in Measurement.model_fields),
            ]
            yield f"{path} is not a key of a comparison. {did_you_mean(path, keys)}"
        elif detail["type"] == "missing":
            yield f"{path}: required, but not set."
        else:
            message = detail["msg"].removeprefix("Value error, ").rstrip(".")
            yield f"{path}={detail['input']!r}: {message[0].lower() + message[1:]}."
