"""A configuration as a YAML file with comments, and the differences between two configurations."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from flowgrain.config.schema import Config
from flowgrain.settings import Section


class Difference(NamedTuple):
    """A setting that differs: its full path, and its YAML value on both sides.

    "-" marks a setting that a side does not have.
    """

    path: str
    left: str
    right: str


def to_yaml(config: Config) -> str:
    """`config` as a YAML file that lists every setting, with its description and unit as a comment.

    `load_config` on this file returns an equal configuration.
    """
    values = config.to_dict()
    lines: list[str] = []
    for name, field in Config.model_fields.items():
        section = getattr(config, name)
        if lines:
            lines.append("")
        if isinstance(section, Section):
            lines += [f"# {field.description}", f"{name}:"]
            lines += _section_lines(section, values[name], "  ")
            if section is config.optimizer and section.learning_rate is None:
                place = lines.index("  learning_rate: null")
                lines.insert(place, f"  # Here: {config.learning_rate:g}.")
        else:
            lines += _setting_lines(name, values[name], _comment(field), "")
    return "\n".join(lines) + "\n"


def differences(left: Config, right: Config) -> list[Difference]:
    """The settings that differ between two configurations, in the order of the file."""
    a, b = (dict(_flat(config.to_dict(), "")) for config in (left, right))
    paths = sorted({*a, *b}, key=lambda path: _order(path, [*a, *b]))
    found = (Difference(path, a.get(path, "-"), b.get(path, "-")) for path in paths)
    return [difference for difference in found if difference.left != difference.right]


def inline(value: Any) -> str:
    """`value` as YAML in one line, in the form of an override on the command line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _section_lines(section: Section, values: Mapping[str, Any], indent: str) -> Iterator[str]:
    """The lines of a section, including its inner sections."""
    fields = type(section).model_fields
    for name, value in values.items():
        field = fields.get(name)  # None for the name of a method
        inner = getattr(section, name) if field is not None else None
        if isinstance(inner, Section):
            yield f"{indent}# {field.description}" if field is not None else ""
            yield f"{indent}{name}:"
            yield from _section_lines(inner, value, f"{indent}  ")
        else:
            yield from _setting_lines(name, value, _comment(field), indent)


def _setting_lines(name: str, value: Any, comment: str, indent: str) -> Iterator[str]:
    if comment:
        yield f"{indent}# {comment}"
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        yield f"{indent}{name}:"
        yield from (f"{indent}  - {inline(entry)}" for entry in value)
    else:
        yield f"{indent}{name}: {inline(value)}"


def _comment(field: Any) -> str:
    """Description and unit of a field."""
    if field is None:
        return ""
    extra = field.json_schema_extra
    unit = extra.get("unit") if isinstance(extra, dict) else None
    return f"{field.description} Unit: {unit}." if unit else str(field.description)


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The full path and the YAML value of every setting below `path`.

    The path of a setting in a list of rewards contains the reward: rewards[hps].weight.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{path}.{key}" if path else str(key))
    elif _is_named(value):
        for entry in value:
            rest = {key: inner for key, inner in entry.items() if key != "name"}
            yield from _flat(rest, f"{path}[{entry['name']}]")
    else:
        yield path, inline(value)


def _is_named(value: Any) -> bool:
    """Whether `value` is a list of mappings with different names."""
    if not isinstance(value, list) or not value:
        return False
    names = [entry.get("name") for entry in value if isinstance(entry, Mapping)]
    return None not in names and len(set(names)) == len(value)


def _order(path: str, known: Sequence[str]) -> tuple[int, int]:
    """Sort key of a setting: its section, then its position in `known`."""
    sections = list(Config.model_fields)
    section = path.split(".")[0].split("[")[0]
    return sections.index(section), known.index(path)
