"""The metrics of a run as columns."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowgrain.records import html


class History(Mapping[str, list[float]]):
    """Columns of metrics.jsonl: equal lengths, NaN where a step has no such value.

    `pandas.DataFrame(history)` makes a table with one row per step.

    Args:
        lines: metrics of the steps. "step" becomes the first column.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        names = dict.fromkeys(["step", *(name for line in lines for name in line)])
        self._columns = {name: [line.get(name, math.nan) for line in lines] for name in names}
        self._length = len(lines)

    def __getitem__(self, name: str) -> list[float]:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        """Number of columns."""
        return len(self._columns)

    def __repr__(self) -> str:
        return f"History({self._length} lines, {len(self)} columns)"

    def _repr_html_(self) -> str:
        rows = []
        for name, values in self._columns.items():
            known = [value for value in values if math.isfinite(value)]
            if name != "step" and known:
                rows.append([name, len(known), known[0], known[-1], min(known), max(known)])
        head = ["metric", "values", "first", "last", "least", "greatest"]
        steps = self._columns["step"]
        title = f"Steps {steps[0]} to {steps[-1]}" if steps else "No step was finished"
        return html.page(title, html.table(head, rows))
