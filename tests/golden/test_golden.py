"""flowgrain's mathematics against numbers that the published implementations computed."""

import re

import pytest
from golden.comparison import DATA, Row, difference, run
from golden.table import PAGE, load_comparisons, read, sections

ROWS = load_comparisons()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.file}: {row.quantity}")
def test_comparison(row: Row) -> None:
    result = run(row)
    assert result.cases > 0
    if row.deviation:
        assert result.different > 0, f"no case differs any more: {row.deviation}"
    else:
        assert not result.details, f"tolerance {row.tolerance} ({row.reason})"


def test_every_file_is_compared() -> None:
    files = {path.stem for path in DATA.glob("*.json")}
    assert files == {row.file for row in ROWS}


def test_every_source_names_repository_commit_and_function() -> None:
    for row in ROWS:
        for source in row.source.split("; "):
            assert re.fullmatch(r"[\w.-]+/[\w.-]+ ([0-9a-f]{7}|[\d.]+), \S.*", source), source


def test_every_tolerance_has_a_reason() -> None:
    assert not [row.quantity for row in ROWS if row.tolerance and not row.reason + row.deviation]
    assert max(row.tolerance for row in ROWS) <= 2e-5


@pytest.mark.parametrize("name", ["summary", "comparisons", "deviations"])
def test_the_page_shows_the_comparisons(name: str) -> None:
    """Except the largest differences, which depend on the machine. Run `make faithfulness`."""

    def stable(text: str) -> list[list[str]]:
        column = 4 if name == "comparisons" else 0
        lines = [line.split(" | ") for line in text.splitlines()]
        return [[cell for i, cell in enumerate(cells, 1) if i != column] for cells in lines]

    assert stable(read(PAGE.read_text(encoding="utf-8"), name)) == stable(sections(ROWS)[name])


def test_the_readme_states_the_number_of_comparisons() -> None:
    agreeing = [row for row in ROWS if not row.deviation]
    cases = sum(run(row).cases for row in agreeing)
    root = PAGE.parents[1]
    readme = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(agreeing)} quantities in {cases:,} cases agree" in readme
    assert f"{len(ROWS) - len(agreeing)} differ on purpose" in readme
    assert f"[{len(agreeing)} quantities]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("ours", "expected", "value"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.0, 9.0], [1.0, None], 0),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
        ("a", "b", 1),
        ([True], [False], 1),
        (0.0, 0, 0),
    ],
)
def test_differences(ours: object, expected: object, value: float) -> None:
    assert difference(ours, expected) == value
