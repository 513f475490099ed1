"""MkDocs hook: generates the pages "Settings" and "Command line" of the reference from the code.

The pages are part of every build, so they always match the code:

    reference/settings.md   from flowgrain.config.schema.Config, the methods and the rewards
    reference/cli.md        from the typer application
"""

import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flowgrain.cli.app import app
from flowgrain.config.schema import Config
from flowgrain.methods import METHODS, Method, PolicyGradient
from flowgrain.monitors import MONITORS
from flowgrain.registry import Registry
from flowgrain.rewards import PAIR_JUDGES, REWARDS, RewardConfig

BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"reference/settings.md": settings_page(), "reference/cli.md": cli_page()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Insert the table of monitors into the guide."""
    return markdown.replace("<!-- monitors -->", monitors_table())


def monitors_table() -> str:
    """All monitors: what they measure, their unit, and the direction that is worse."""
    head = ["Monitor", "Value of an image", "Unit", "Worse", "Also on rollouts"]
    lines = [
        [f"`{name}`", m.meaning, m.unit, WORSE[m.worse], "yes" if m.rollouts else ""]
        for name, m in MONITORS.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * 5, *lines])


WORSE = {"up": "higher", "down": "lower", "change": "any change"}


# ------------------------------------------------------------------------------ settings


def settings_page() -> str:
    """All sections of the settings, and the options of every method and reward."""
    parts = [SETTINGS_INTRO, table(rows(Config, "", ["name"]))]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if name == "method":
            parts += ["## method", METHOD_INTRO]
        elif name == "rewards":
            parts += ["## rewards", field.description or "", REWARDS_INTRO]
            parts.append(table(rows(RewardConfig, "rewards[].")))
        elif isinstance(section, type) and issubclass(section, BaseModel):
            parts += [f"## {name}", summary(section), table(rows(section, f"{name}."))]
    return "\n\n".join([*parts, *method_options(), *reward_options()]) + "\n"


SETTINGS_INTRO = """# Settings

```bash
flowgrain config show flux/g2rpo
```

The command prints the resolved settings of a recipe as YAML. Set a value with `section.key=VALUE`
on the command line, or in a YAML file. [Settings and recipes](../guides/settings.md) explains how
recipes, files and overrides are merged.

A resumed run must keep the settings that are marked as fixed. All other settings can change.

## name"""

METHOD_INTRO = """The training method, `method.name`, and its options. See
[Options of the methods](#options-of-the-methods)."""

REWARDS_INTRO = """A list of mappings. All keys other than the following are options of the
reward, see [Options of the rewards](#options-of-the-rewards)."""


def summary(section: type) -> str:
    """The first paragraph of a docstring as one line."""
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())


def rows(
    section: type[BaseModel], prefix: str, only: Iterable[str] | None = None
) -> Iterator[list[str]]:
    """A table row for every field of `section`, with the fields of sections inside it."""
    for name, field in section.model_fields.items():
        if only is not None and name not in only:
            continue
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from rows(kind, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        unit = f" ({extra['unit']})" if extra.get("unit") else ""
        resume = "fixed" if extra.get("keep") else ""
        setting = f"`{prefix}{name}`<br>{field.description or ''}"
        yield [setting, type_of(field) + unit, default_of(field), resume]


def table(lines: Iterable[list[str]]) -> str:
    """A Markdown table of settings."""
    head = ["Setting", "Type", "Default", "On resume"]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])


def type_of(field: FieldInfo) -> str:
    """The type of a field in words, with its bounds."""
    bounds = [
        f"{sign} {getattr(m, name):g}"
        for m in field.metadata
        for kind, (sign, name) in BOUNDS.items()
        if isinstance(m, kind)
    ]
    return ", ".join([type_name(field.annotation), *bounds])


def type_name(annotation: Any) -> str:
    """`annotation` in words: "int", "list of float", "`a` or `b`"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments if a is not type(None))
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is not None:
        return "mapping"
    return {"str": "string", "bool": "true or false", "Any": "any"}.get(
        annotation.__name__, annotation.__name__
    )


def default_of(field: FieldInfo) -> str:
    """The default of a field as it is written in YAML."""
    value = field.get_default(call_default_factory=True, validated_data={})
    return "required" if value is PydanticUndefined else yaml_value(value)


def yaml_value(value: Any) -> str:
    """`value` in YAML, as code."""
    return f"`{plain_yaml(value)}`"


def plain_yaml(value: Any) -> str:
    """`value` in YAML, on one line."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(plain_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def method_options() -> list[str]:
    """Options that all methods have, and for every method the options that it adds or changes."""
    methods = {name: METHODS.get(name) for name in sorted(METHODS)}
    others = [name for name, kind in methods.items() if not issubclass(kind, PolicyGradient)]
    shared = set(PolicyGradient.model_fields) - set(Method.model_fields)
    return [
        "## Options of the methods",
        "Options of every method:",
        table(rows(Method, "method.")),
        f"Options of every method that trains stochastic steps, which is all methods except "
        f"{', '.join(f'`{name}`' for name in others)}:",
        table(rows(PolicyGradient, "method.", shared)),
        *(part for method in methods.values() for part in options_of(method)),
    ]


def options_of(method: type[Method]) -> Iterator[str]:
    """The options that `method` adds, and the options whose default it changes."""
    base = PolicyGradient if issubclass(method, PolicyGradient) else Method
    changed = [key for key, field in method.model_fields.items() if differs(base, key, field)]
    yield f"### {method.name}"
    yield summary(method)
    values = [
        f"`{section}.{key}={plain_yaml(value)}`"
        for section, keys in method.config_defaults.items()
        for key, value in keys.items()
    ]
    if values:
        yield f"Defaults in other sections: {', '.join(values)}."
    yield (
        table(rows(method, "method.", changed))
        if changed
        else "All options have the defaults above."
    )


def differs(base: type[BaseModel], key: str, field: FieldInfo) -> bool:
    """Whether `field` is not an option of `base`, or has another default there."""
    known = base.model_fields.get(key)
    return known is None or known.default != field.default


def reward_options() -> list[str]:
    """The options of every reward and pairwise judge, from the signature of its class."""
    return [
        "## Options of the rewards",
        "Options without a default are required. [Rewards](../guides/rewards.md) describes them.",
        options_table("Reward", REWARDS),
        "Judges of the reward `pairwise`:",
        options_table("Judge", PAIR_JUDGES),
    ]


def options_table(kind: str, registry: Registry[Any]) -> str:
    """The options of every class or function of a registry."""
    lines = [f"| {kind} | Options |", "| --- | --- |"]
    for name in registry:
        parameters = inspect.signature(registry.get(name)).parameters.values()
        options = [option_text(parameter) for parameter in parameters]
        lines.append(f"| `{name}` | {', '.join(filter(None, options)) or 'none'} |")
    return "\n".join(lines)


def option_text(parameter: inspect.Parameter) -> str:
    """An argument as `name=default`. Empty for an argument that is no option."""
    if parameter.kind is parameter.POSITIONAL_ONLY or parameter.name in ("images", "prompts"):
        return ""
    if parameter.default is inspect.Parameter.empty:
        return f"`{parameter.name}`"
    return f"`{parameter.name}={plain_yaml(parameter.default)}`"


# ------------------------------------------------------------------------------ command line


def cli_page() -> str:
    """Every command with its arguments and options."""
    commands = subcommands(typer.main.get_command(app), "flowgrain")
    parts = [part for path, command in commands for part in command_part(path, command)]
    return "\n\n".join([CLI_INTRO, *parts]) + "\n"


CLI_INTRO = """# Command line

```bash
flowgrain --help
```

| Exit code | Meaning |
| --- | --- |
| 0 | success |
| 1 | a run or a check failed |
| 2 | a setting is wrong. Nothing was written |
| 130 | interrupted. The run is saved |"""


def subcommands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All commands without subcommands, with the words that call them."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, sub in command.commands.items():
        yield from subcommands(sub, f"{path} {name}")


def command_part(path: str, command: Any) -> Iterator[str]:
    """The heading, usage, help and options of a command."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = [path, *(["[OPTIONS]"] if options else [])]
    usage += [p.metavar or str(p.name).upper() for p in arguments]
    yield f"## {path}"
    yield f"```text\n{' '.join(usage)}\n```"
    yield re.sub(r"\n(?=\* )", "\n\n", inspect.cleandoc(command.help or ""), count=1)
    lines = ["| Option | Default | Description |", "| --- | --- | --- |"]
    if options:
        yield "\n".join([*lines, *map(option_row, options)])


def option_row(option: Any) -> str:
    """A table row of an option."""
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    value = "" if option.is_flag or option.default in (None, ()) else f"`{option.default}`"
    return f"| {names} | {value} | {(option.help or '').replace('|', chr(92) + '|')} |"
