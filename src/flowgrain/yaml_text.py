"""A check of YAML text before it is loaded: its depth, and the size of its aliases."""

import yaml

MAX_DEPTH = 50
"""Levels of nested lists and mappings. The C parser of deep text would crash the process."""
MAX_VALUES = 100_000
"""Values after the aliases are inserted."""
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str, mapping: bool = False) -> None:
    """Check that `text` can be loaded with little memory.

    Args:
        text: YAML.
        mapping: whether it must be a mapping, or empty.

    Raises:
        ValueError: it is nested too deeply, or it has too many values, counting aliases.
        YAMLError: it is not YAML.
    """
    depth = 0
    sizes: dict[str, int] = {}
    open_parts: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size of a part
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
            open_parts.append((event.anchor, 1))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, size = open_parts.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} is inside of itself, or unknown")
            anchor, size = None, sizes[event.anchor]
        else:
            continue
        if mapping and depth == 0 and not isinstance(event, yaml.MappingEndEvent):
            found = "a list" if isinstance(event, yaml.SequenceEndEvent) else "one value"
            raise ValueError(
                f"contains {found}. Write sections such as training: {{max_steps: 40}}"
            )
        if anchor is not None:
            sizes[anchor] = size
        above, total = open_parts[-1]
        if total + size > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values, counting aliases")
        open_parts[-1] = (above, total + size)


def syntax_error(error: Exception, with_line: bool = True) -> str | None:
    """What is missing, and in which line, for an error of the YAML syntax. None for others."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return None
    mark = error.problem_mark
    problem = error.problem.replace("did not find expected", "expected")
    problem = problem.replace("expected key", "expected `key: value` below the key above it")
    if "cannot start any token" in problem:
        problem += ". Use spaces in place of tabs, and quotes around texts with @ or `"
    return f"line {mark.line + 1} is not YAML: {problem}" if mark and with_line else problem
