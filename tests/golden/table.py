"""The tables of docs/faithfulness.md."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

from golden.comparison import COMPARISONS, Row, run

PAGE = Path(__file__).parents[2] / "docs" / "faithfulness.md"
ORDER = ("kernels", "fastvideo", "solvers", "grids", "credit", "objectives", "forward")


def load_comparisons() -> list[Row]:
    """The rows of all *_cases.py modules, in the order of the page."""
    subjects = sorted(path.stem for path in Path(__file__).parent.glob("*_cases.py"))
    first = [f"{subject}_cases" for subject in ORDER]
    modules = [*first, *(name for name in subjects if name not in first)]
    for name in modules:
        importlib.import_module(f"golden.{name}")
    place = {f"golden.{name}": number for number, name in enumerate(modules)}
    return sorted(COMPARISONS, key=lambda row: place[COMPARISONS[row].__module__])


def agreements(rows: Sequence[Row]) -> str:
    """Table of the rows that agree."""
    lines = [
        "| Quantity | Computed by | Cases | Largest difference | Tolerance | Reason |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if not row.deviation:
            result = run(row)
            tolerance = f"{row.tolerance:.0e}".replace("e-0", "e-") if row.tolerance else "exact"
            largest = f"{result.largest:.0e}".replace("e-0", "e-") if result.largest else "0"
            cells = row.quantity, _source(row), result.cases, largest, tolerance, row.reason
            lines.append(_line(*cells))
    return "\n".join(lines)


def deviations(rows: Sequence[Row]) -> str:
    """Table of the rows that differ on purpose."""
    lines = [
        "| Quantity | Computed by | Cases | Cases that differ | Difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.deviation:
            result = run(row)
            text = row.deviation[0].upper() + row.deviation[1:].rstrip(".") + "."
            if text.startswith("Flowgrain"):
                text = f"f{text[1:]}"
            lines.append(_line(row.quantity, _source(row), result.cases, result.different, text))
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """The finding in one sentence."""
    agreeing = [row for row in rows if not row.deviation]
    cases = sum(run(row).cases for row in agreeing)
    differ = len(rows) - len(agreeing)
    return (
        f"**{len(agreeing)} quantities in {cases:,} cases agree with numbers that the published "
        f"implementations computed. {differ} quantities differ on purpose.**"
    )


def sections(rows: Sequence[Row]) -> dict[str, str]:
    """The generated parts of the page, by the name of their markers."""
    return {
        "summary": summary(rows),
        "comparisons": agreements(rows),
        "deviations": deviations(rows),
    }


def read(page: str, name: str) -> str:
    """The text between the markers `name` of a page."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)
    if found is None:
        raise ValueError(f"{PAGE} has no markers <!-- {name} --> and <!-- /{name} -->. Add them.")
    return found[1]


def write(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers `name`."""
    return page.replace(
        f"<!-- {name} -->\n{read(page, name)}\n<!-- /{name} -->",
        f"<!-- {name} -->\n{text}\n<!-- /{name} -->",
    )


def _source(row: Row) -> str:
    """Repository, commit and function of every source of a row."""
    parts = (source.split(", ", 1) for source in row.source.split("; "))
    return "; ".join(f"{commit} `{function}`" for commit, function in parts)


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
