"""Comparisons with golden numbers: a named quantity, its cases and the largest difference."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Row:
    """One row of the table in docs/faithfulness.md.

    Attributes:
        quantity: what is compared.
        file: golden file, without ".json".
        source: repository, commit and function that computed the numbers.
        tolerance: largest accepted difference; relative to the largest entry of an array. 0: equal.
        reason: reason for the tolerance.
        deviation: empty, or why flowgrain differs on purpose. Then the comparison asserts the
            difference instead of the agreement.
    """

    quantity: str
    file: str
    source: str
    tolerance: float = 0.0
    reason: str = ""
    deviation: str = ""


@dataclass
class Result:
    """The differences of all cases of a row."""

    cases: int = 0
    different: int = 0
    largest: float = 0.0
    details: list[str] = field(default_factory=list)

    def add(self, name: str, difference: float, tolerance: float) -> None:
        """Record the difference of one case."""
        self.cases += 1
        self.largest = max(self.largest, difference)
        if not difference <= tolerance:
            self.different += 1
            self.details.append(f"{name}: {difference:.3g}")


Cases = Callable[[], Iterable[tuple[str, Any, Any]]]
"""Yields (name of the case, value of flowgrain, golden value)."""

COMPARISONS: dict[Row, Cases] = {}


def comparison(
    quantity: str, file: str, source: str, tolerance: float = 0.0, **notes: str
) -> Callable[[Cases], Cases]:
    """Decorator that registers a generator of cases as a row of the table."""

    row = Row(quantity, file, source, tolerance, **notes)
    if row in COMPARISONS:
        raise ValueError(f"two comparisons of {quantity!r} in {file!r} with the same source")

    def add(cases: Cases) -> Cases:
        COMPARISONS[row] = cases
        return cases

    return add


@cache
def run(row: Row) -> Result:
    """Compare all cases of a row."""
    result = Result()
    for name, ours, golden in COMPARISONS[row]():
        result.add(name, difference(ours, golden), row.tolerance)
    return result


def difference(ours: Any, golden: Any) -> float:
    """Largest difference, relative to the largest golden entry. 0 or 1 for values without order.

    `golden` may contain None, which is skipped.
    """
    if isinstance(golden, str | bool) or golden is None:
        return float(ours != golden)
    numbers = list(_flat(_plain(golden)))
    if any(isinstance(x, str | bool) for x in numbers):
        return float(list(_flat(_plain(ours))) != numbers)
    expected = torch.tensor([math.nan if x is None else x for x in numbers], dtype=torch.float64)
    values = torch.tensor(list(_flat(_plain(ours))), dtype=torch.float64)
    if values.shape != expected.shape:
        return float("inf")
    known = expected.isfinite()
    if not known.any():
        return 0.0
    scale = expected[known].abs().max().clamp(min=1e-30)
    largest = ((values - expected)[known].abs() / scale).nan_to_num(float("inf")).max()
    return float(largest)


@cache
def golden(file: str) -> Any:
    """The content of a golden file. Do not change it."""
    return json.loads((DATA / f"{file}.json").read_text(encoding="utf-8"))


def tensor(values: Any) -> Tensor:
    """A float32 tensor of golden numbers."""
    return torch.tensor(values, dtype=torch.float32)


def _plain(values: Any) -> Any:
    return values.tolist() if isinstance(values, Tensor) or hasattr(values, "tolist") else values


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values
