"""The table against its definition, and its text."""

import json
import shutil

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from flowgrain.evaluation import confidence_interval, make_table, read_scores
from flowgrain.evaluation.published import PublishedRow
from flowgrain.evaluation.table import Cell, Row, Table, cell_lines, markdown, part_tables
from flowgrain.settings import SettingsError
from flowgrain.statistics import Interval


def test_the_table_is_its_definition(finished):
    """Seeds are averaged within a prompt. Differences are paired. The first model has none."""
    _, folder = finished
    columns, table = read_scores(folder), make_table(folder)
    rows = {(row.model, row.steps): row for row in table.rows}
    assert list(rows) == [("base", 2), ("full", 2), ("base", 3), ("full", 3)]

    def by_prompt(model, steps):
        chosen = (columns["model"] == model) & (columns["steps"] == steps)
        texts = sorted(set(columns["prompt"][chosen]))
        return np.array(
            [columns["towers"][chosen & (columns["prompt"] == text)].mean() for text in texts]
        )

    before, after = by_prompt("base", 3), by_prompt("full", 3)
    cell = rows["full", 3].cells["towers"]
    for interval, values in ((cell.value, after), (cell.difference, after - before)):
        expected = confidence_interval(values)
        assert interval.mean == pytest.approx(expected.mean, abs=1e-6)
        assert (interval.low, interval.high) == pytest.approx(
            (expected.low, expected.high), abs=1e-6
        )
    assert rows["base", 3].cells["towers"].difference is None
    assert cell.scored == 140
    chosen = (columns["model"] == "full") & (columns["steps"] == 3)
    missing = columns["oracle/missing"][chosen].mean()
    assert rows["full", 3].parts["oracle"]["missing"] == pytest.approx(missing)
    assert [row.steps for row in make_table(folder, steps=[3]).rows] == [3, 3]
    one_seed = make_table(folder, ["full"], [3], [1]).rows[0].cells["towers"]
    assert (one_seed.scored, one_seed.difference) == (70, None)


def test_the_text_of_a_table(finished):
    _, folder = finished
    table = make_table(folder)
    cell = table.rows[3].cells["oracle"]
    assert f"| full | 3 | {cell.value.mean:.3f} [" in markdown(table)
    assert "Parts of oracle" in markdown(table)
    (part_table,) = part_tables(table)
    assert part_table.lines[0][:2] == ("base", "2")
    values = json.loads(table.to_json())
    cells = values["rows"][3]["cells"]["oracle"]
    assert cells["difference"]["mean"] == pytest.approx(cell.difference.mean)
    assert values["rows"][2]["cells"]["oracle"]["difference"] is None


def test_differences_use_images_that_both_models_have(finished, tmp_path):
    """Equal scores, but a model lacks some from a seed with low scores: the difference is 0."""
    _, folder = finished
    shutil.copytree(folder, tmp_path / "out")
    for model in ("base", "full"):
        for file in (tmp_path / "out" / "scores" / model).glob("*"):
            table = parquet.read_table(file)
            seed, place = (table.column(name).to_numpy() for name in ("seed", "place"))
            values = (place % 5) / 5 - 0.5 * seed
            if model == "full":
                values = np.where((seed == 1) & (place % 2 == 0), np.nan, values)
            index = table.column_names.index("towers")
            table = table.set_column(index, "towers", pyarrow.array(values))
            parquet.write_table(table, file)
    cell = make_table(tmp_path / "out", steps=[2]).rows[1].cells["towers"]
    assert cell.difference.mean == 0
    assert cell.failed == 35


def test_the_lines_of_a_cell():
    nan = float("nan")
    value = Interval(0.5, 0.4, 0.6)
    cell = Cell(value, Interval(0.1, -0.1, 0.3), 4, 0)
    assert cell_lines(cell) == ["0.500", "[0.400, 0.600]", "Δ +0.100", "[-0.100, +0.300]"]
    assert cell_lines(cell, wide=True) == ["0.500 [0.400, 0.600]", "Δ +0.100 [-0.100, +0.300]"]
    assert cell_lines(Cell(Interval(0.5, nan, nan), None, 1, 3)) == ["0.500", "3 not scored"]
    assert cell_lines(Cell(Interval(nan, nan, nan), None, 0, 4)) == ["-", "4 not scored"]


def test_published_rows_follow_the_measured_ones():
    cell = Cell(Interval(0.5, 0.4, 0.6), None, 4, 0)
    row = Row("mine", 10, {"hps": cell}, {"hps": {"style": 0.25}})
    papers = [
        PublishedRow("flux", "A Paper, arXiv 1", "theirs", None, {"hps": 0.3}),
        PublishedRow("flux", "A Paper, arXiv 1", "parts", 10, {"hps/style": 0.125}),
    ]
    text = markdown(Table(["hps"], [row], papers, []))
    assert text.splitlines() == [
        "| model | steps | hps |",
        "|---|---|---|",
        "| mine | 10 | 0.500 [0.400, 0.600] |",
        "| theirs (published, A Paper, arXiv 1) | - | 0.300 |",
        "",
        "Parts of hps",
        "",
        "| model | steps | style |",
        "|---|---|---|",
        "| mine | 10 | 0.250 |",
        "| parts (published, A Paper, arXiv 1) | 10 | 0.125 |",
    ]


def test_a_directory_without_scores(tmp_path):
    with pytest.raises(SettingsError, match="contains no scores yet"):
        read_scores(tmp_path)
    with pytest.raises(SettingsError, match="contains no evaluation"):
        make_table(tmp_path)
