"""Loading of configurations from defaults, recipes, files and overrides.

Later layers replace earlier layers: field defaults, the method's values for other sections, the
model's defaults, the recipe or file, the preset, the overrides.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from flowgrain.config.explain import explain
from flowgrain.config.presets import apply_preset
from flowgrain.config.saved import saved_settings
from flowgrain.config.schema import Config
from flowgrain.methods import METHODS, DifferentiableReward
from flowgrain.models.base import BACKBONES
from flowgrain.registry import load_plugin
from flowgrain.settings import SettingsError, nearest, one_line
from flowgrain.yaml_file import read_mapping
from flowgrain.yaml_text import check_yaml, syntax_error

DEFAULT = "demo"
_RECIPES = files("flowgrain.config").joinpath("recipes")
_MODELS = files("flowgrain.config").joinpath("models")
Values = dict[str, Any]


def load_config(
    source: str | Path = DEFAULT,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    preset: str | None = None,
    plugins: Iterable[str | Path] = (),
) -> Config:
    """The configuration that `source` names, with `overrides`.

    Args:
        source: name of a bundled recipe ("demo", "flux/g2rpo") or of a method, path of a YAML file,
            or directory of a run.
        overrides: "section.key=VALUE" with YAML values, or a mapping from full paths to values.
        preset: name of a preset, such as "one-gpu".
        plugins: Python files that register methods, rewards or backbones.

    Raises:
        SettingsError: the source does not exist, or a setting is wrong. The message names the
            setting and the fix.

    Example:
        >>> load_config("g2rpo", {"method.granularities": [1, 2], "training.max_steps": 40})
    """
    changes = with_absolute_plugins(parse_overrides(overrides), Path.cwd())
    extra = {"runtime": {"plugins": [str(path) for path in plugins]}}
    plugin_files = _plugins_of(with_absolute_plugins(extra, Path.cwd()))
    for path in [*plugin_files, *_plugins_of(changes)]:
        load_plugin(path)  # before the source, which may be the name of a plugin's method
    name, values = read_source(source)
    values.pop("recipe", None)
    for path in _plugins_of(values):
        load_plugin(path)
    merged = with_defaults(merge({"name": name, **values}, changes))
    if preset is not None:
        merged = merge(apply_preset(preset, merged), changes)
    if plugin_files:
        files_of_run = list(dict.fromkeys([*_plugins_of(merged), *plugin_files]))
        merged = merge(merged, {"runtime": {"plugins": files_of_run}})
    return validate(merged)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A validated copy of `config` with `changes` by full path."""
    return validate(merge(config.to_dict(), parse_overrides(changes)))


def with_defaults(values: Values) -> Values:
    """`values`, merged into the method's values for other sections and the model's defaults."""
    of_method: Mapping[str, Any] = {}
    of_model = model_defaults(_section(values, "model").get("name", "shapes"))
    rewards = of_model.pop("rewards_with_gradient", None)
    method = _section(values, "method").get("name")
    if isinstance(method, str) and method in METHODS:
        of_method = METHODS.get(method).config_defaults
        if rewards and issubclass(METHODS.get(method), DifferentiableReward):
            of_model["rewards"] = rewards
    return merge(of_method, of_model, values)


def model_defaults(name: Any) -> Values:
    """Default settings of a model, in any spelling of its name. Empty for a model that has none."""
    file = _MODELS.joinpath(f"{BACKBONES.find(str(name))}.yaml")
    return read_yaml(file) if file.is_file() else {}


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> Values:
    """Nested values of overrides, "section.key=VALUE" words or a mapping from full paths to values.

    Raises:
        SettingsError: a word has another form, or its value is not YAML.
    """
    if not isinstance(overrides, Mapping):
        for word, following in zip(overrides, [*overrides[1:], "="], strict=False):
            path, equals, value = word.partition("=")
            if not equals or not path:
                fix = "section.key=VALUE"
                if not equals and "." in word:
                    fix = f"{word}={'VALUE' if '=' in following else following}"
                raise SettingsError(f"{word!r} is not an override. Write {fix}.")
            if not value.strip():
                raise SettingsError(
                    f"{word}: is empty. Write {path}=VALUE, or remove it to use the default."
                )
    try:
        if isinstance(overrides, Mapping):
            nested = OmegaConf.create()
            for path, value in overrides.items():
                OmegaConf.update(nested, str(path), _plain(value), merge=True, force_add=True)
        else:
            for word in overrides:
                check_yaml(word.partition("=")[2])
            nested = OmegaConf.from_dotlist(list(overrides))
        return _container(nested)
    except (
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
        IndexError,
        RecursionError,
    ) as error:
        words = (
            overrides
            if not isinstance(overrides, Mapping)
            else [f"{k}={v}" for k, v in overrides.items()]
        )
        text = " ".join(words)
        raise SettingsError(
            f"{text if len(text) < 500 else f'{text[:500]}...'}: "
            f"not a YAML value ({(syntax_error(error, False) or one_line(error))[:500]})."
        ) from error


def merge(*layers: Mapping[str, Any]) -> Values:
    """Nested mappings merged from left to right. A list replaces a list.

    Raises:
        SettingsError: a mapping would replace a list or a value.
    """
    try:
        return _container(OmegaConf.merge(*(OmegaConf.create(_plain(layer)) for layer in layers)))
    except TypeError:
        if any(isinstance(layer.get("rewards"), Mapping) for layer in layers):
            message = (
                "rewards is a list. Write the whole list: "
                "rewards=[hps,clip] or rewards=[{name: hps, weight: 0.5}]."
            )
        else:
            message = _replaced_section(layers)
        raise SettingsError(message) from None


def _replaced_section(layers: Sequence[Mapping[str, Any]]) -> str:
    """The error message for layers of which one replaces a section by another value."""
    for name in layers[0]:
        given = [layer[name] for layer in layers if name in layer]
        other = [value for value in given if not isinstance(value, Mapping)]
        if other and len(other) < len(given):
            return f"{name}={other[-1]!r}: is a section. Write {name}.KEY=VALUE."
    return "An override replaces a whole section by a value. Write section.key=VALUE."


def read_source(source: str | Path) -> tuple[str, Values]:
    """The name and the nested values of a recipe, method, YAML file or run directory.

    Raises:
        SettingsError: there is no such source, or it cannot be read.
    """
    text, path = str(source), Path(source).expanduser()
    if not isinstance(source, Path):  # a Path is never the name of a recipe or a method
        if text in recipe_names():
            return text.replace("/", "-"), read_yaml(_RECIPES.joinpath(f"{text}.yaml"))
        if text in METHODS:
            name = METHODS.find(text)
            return str(name), {"method": {"name": name}}
    if path.exists():
        file = path / "run.yaml" if path.is_dir() else path
        if not file.exists():
            raise SettingsError(f"{path}: not the directory of a run. It has no run.yaml.")
        values = read_yaml(file)
        if file.name == "run.yaml":
            values = saved_settings(values, file)
        return file.stem, with_absolute_plugins(values, file.resolve().parent)
    if path.suffix in (".yaml", ".yml"):
        raise SettingsError(f"{text}: there is no such file. Give the path of a YAML file.")
    close = nearest(text, [*recipe_names(), *METHODS])
    if close is None and "/" in text:
        raise SettingsError(f"{text}: there is no such directory. Give a run, or a recipe.")
    known = "Known: demo, a method (g2rpo, ...) or a file. List them with flowgrain recipes."
    hint = f"Did you mean {close!r}?" if close else known
    raise SettingsError(
        f"There is no recipe, method, file or run {text!r}. {hint} "
        "A custom method needs --plugin FILE.py."
    )


def read_yaml(file: Path | Traversable) -> Values:
    """The mapping in a YAML file, with resolved references.

    Raises:
        SettingsError: the file is not YAML, or does not contain a mapping with text keys.
    """
    return read_mapping(
        file,
        lambda text: _container(OmegaConf.create(text)),
        (OmegaConfBaseException, AttributeError),
    )


def recipe_names() -> list[str]:
    """Names of the bundled recipes: the demo, then "model/method" in alphabetical order."""
    names = [entry.name.removesuffix(".yaml") for entry in _RECIPES.iterdir() if entry.is_file()]
    for folder in (entry for entry in _RECIPES.iterdir() if entry.is_dir()):
        names += [f"{folder.name}/{entry.name.removesuffix('.yaml')}" for entry in folder.iterdir()]
    return sorted((n for n in names if not n.startswith("_")), key=lambda name: ("/" in name, name))


def recipe_facts(name: str) -> Values:
    """The `recipe` block of a bundled recipe: title, paper, task, hardware, cost and results."""
    facts = read_yaml(_RECIPES.joinpath(f"{name}.yaml")).get("recipe", {})
    return {"name": name, **facts}


def validate(values: Values) -> Config:
    """The configuration with these nested values.

    Raises:
        SettingsError: a setting is wrong. The message has one line per wrong setting.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(explain(error, values))) from None


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name, {})
    return section if isinstance(section, Mapping) else {}


def with_absolute_plugins(values: Values, folder: Path) -> Values:
    """`values` with the paths in runtime.plugins resolved from `folder`.

    Raises:
        SettingsError: an entry cannot be a path.
    """
    paths = _plugins_of(values)
    if not paths:
        return values
    try:
        files = [str((folder / Path(path).expanduser()).resolve()) for path in paths]
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingsError(f"runtime.plugins={paths}: not a list of files ({error}).") from error
    return merge(values, {"runtime": {"plugins": files}})


def _plugins_of(values: Mapping[str, Any]) -> list[str]:
    plugins = _section(values, "runtime").get("plugins", [])
    return [str(path) for path in plugins] if isinstance(plugins, list | tuple) else []


def _plain(value: Any) -> Any:
    """`value` without models and tuples, which OmegaConf does not accept."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _container(config: Any) -> Values:
    plain = OmegaConf.to_container(config, resolve=False)
    if not isinstance(plain, dict):
        raise ValueError("not a mapping of sections")
    _reject_references(plain, "")
    return dict(plain)


def _reject_references(value: Any, path: str) -> None:
    """Check that no text refers to other values or to environment variables.

    OmegaConf would insert them. A file from another person could then read secrets.

    Raises:
        SettingsError: a text contains ${ or is ???.
    """
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise SettingsError(f"{path}={value}: references are not supported. Write the value.")
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            _reject_references(entry, f"{path}.{key}" if path else str(key))
