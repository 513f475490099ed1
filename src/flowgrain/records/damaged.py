"""What to do with damaged records of a run that is resumed: they never stop a run."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from flowgrain.records.evaluations import read_evaluation
from flowgrain.records.files import flush
from flowgrain.records.group_files import read_group
from flowgrain.records.images import DamagedRecord, member_names
from flowgrain.records.metrics import describe_lines, parse_metrics

_OF_STEP = re.compile(r"-\d{6,}\.(?:json|zip)$")
"""End of a file name of the run."""
_READERS: Mapping[str, Callable[[Path], object]] = {
    "evaluations/step-*.json": read_evaluation,
    "evaluations/images-*.zip": member_names,
    "groups/step-*.zip": read_group,
}


def set_damaged_lines_aside(file: Path) -> list[str]:
    """Append the damaged lines of metrics.jsonl to metrics.damaged.jsonl.

    `file` does not change. The caller replaces it.

    Returns:
        A message if there were damaged lines.
    """
    if not file.exists():
        return []
    _, damaged = parse_metrics(file.read_bytes())
    if not damaged:
        return []
    aside = file.with_name(f"{file.stem}.damaged{file.suffix}")
    with aside.open("ab") as stream:
        stream.write(b"".join(line.text + b"\n" for line in damaged))
    flush(aside)
    return [f"{file}: {describe_lines(damaged)}. Moved to {aside.name}"]


def set_damaged_files_aside(folder: Path) -> list[str]:
    """Rename the damaged evaluations and groups of a run to damaged-NAME.

    Returns:
        A message for each file.
    """
    messages = []
    for pattern, read in _READERS.items():
        for path in sorted(p for p in folder.glob(pattern) if _OF_STEP.search(p.name)):
            try:
                read(path)
            except DamagedRecord as error:
                aside = path.with_name(f"damaged-{path.name}")
                path.rename(aside)
                messages.append(f"{error}, and renamed to {aside.name}")
    return messages
