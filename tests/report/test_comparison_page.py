"""The tables and the page of a comparison."""

import json
import shutil

import numpy as np
import pytest
from pages import Page

from flowgrain.evaluation import confidence_interval
from flowgrain.report import write_comparison
from flowgrain.report.comparison_table import Row, best_label, make_tables, markdown
from flowgrain.settings import SettingsError
from flowgrain.statistics import Interval
from flowgrain.studies.results import result_file, results


def test_rows_are_means_over_seeds(comparison):
    specification, folder = comparison
    found = results(folder)
    rows = make_tables(specification, found)["oracle"][3]
    assert [(row.label, row.baseline, row.seeds) for row in rows] == [
        ("g2rpo", "g2rpo", 2),
        ("mixgrpo", "g2rpo", 2),
    ]
    values = {(r["label"], r["seed"]): r["steps"]["3"]["oracle"] for r in found if r["seed"]}
    own = [values["mixgrpo", seed] for seed in (1, 2)]
    other = [values["g2rpo", seed] for seed in (1, 2)]
    assert rows[1].metrics["oracle"] == confidence_interval(np.array(own))
    difference = confidence_interval(np.array(own) - np.array(other))
    assert rows[1].differences["oracle"].mean == pytest.approx(difference.mean)
    assert rows[1].differences["oracle"].high == pytest.approx(difference.high)
    assert rows[0].differences["oracle"].mean == 0


def test_the_page(comparison):
    _, folder = comparison
    page = Page(write_comparison(folder).read_text())
    for word in ("mixgrpo", "frechet", "diversity", "base model", "2 seeds", "FIGURE"):
        assert word in page.text
    assert "5 of 5 runs finished" in page.text
    # Base and two methods, images of all 8 prompts in two samples each, of which 8 are kept.
    assert len(page.sources) == 3 * 8
    tables = json.loads((folder / "comparison.json").read_text())
    row = tables["tables"]["oracle"]["3"][1]
    assert row["label"] == "mixgrpo"
    assert set(row["differences"]["oracle"]) == {"mean", "low", "high"}
    assert tables["base"]["label"] == "base"
    text = (folder / "comparison.md").read_text()
    assert "Trained on oracle, 2 inference steps" in text
    assert "| method | seeds | oracle |" in text


def test_an_unfinished_comparison(comparison, tmp_path):
    _, folder = comparison
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    for path in (copied / "runs").glob("mixgrpo*/result.json"):
        path.unlink()
    result_file(copied, "g2rpo+oracle+2").unlink()
    page = Page(write_comparison(copied).read_text())
    assert "2 of 5 runs finished" in page.text
    assert "mixgrpo" not in page.text
    assert "±" not in page.text.split("inference steps")[1]  # one seed has no interval
    result_file(copied, "g2rpo+oracle+1").unlink()
    with pytest.raises(SettingsError, match="no run of this comparison is finished"):
        write_comparison(copied)
    with pytest.raises(SettingsError, match="not the directory of a comparison"):
        write_comparison(tmp_path)


def row(label, **means):
    metrics = {name: Interval(value, value - 0.5, value + 0.5) for name, value in means.items()}
    return Row(label, "a", 2, 1, 3, 1, metrics, metrics, diverged=int(label == "b"))


def test_the_best_method():
    rows = [row("a", oracle=0.2, frechet=3, diversity=1), row("b", oracle=0.3, frechet=5)]
    assert best_label(rows, "oracle") == "b"
    assert best_label(rows, "frechet") == "a"
    assert best_label(rows, "diversity") is None
    assert best_label(rows, "hps") is None


def test_markdown():
    base = {"steps": {"8": {"oracle": 0.125}}}
    rows = [row("a", oracle=0.25), row("b", oracle=0.5)]
    assert list(markdown(base, {"set": {8: rows}}, ["oracle", "hps"])) == [
        "Trained on set, 8 inference steps",
        "",
        "| method | seeds | oracle | hps | updates |",
        "|---|---|---|---|---|",
        "| base |  | 0.125 | nan |  |",
        "| a | 2 | 0.250 ± 0.500 | - | 3 |",
        "| b (1 diverged) | 2 | 0.500 ± 0.500 [+0.000, +1.000] | - | 3 |",
        "",
    ]
