"""The page of a run."""

import json
import shutil

import numpy as np
import pytest
import yaml
from pages import Page
from PIL import Image

from flowgrain import load_config
from flowgrain.evaluation import confidence_interval
from flowgrain.report import write_report
from flowgrain.report.image_pairs import image_pairs, part_changes
from flowgrain.report.render import data_uri, tiles
from flowgrain.report.run_curves import moving_average, run_figures
from flowgrain.report.run_data import read_run_data
from flowgrain.report.run_page import evaluation_facts, training_facts
from flowgrain.report.svg import PALETTE, Curve, draw_figure
from flowgrain.settings import SettingsError
from flowgrain.training.pictures import contact_sheet
from flowgrain.training.run_files import write_run


def test_the_page(run):
    page = Page(write_report(run).read_text())
    assert "G2RPO on shapes · 2 of 2 training steps · seed 0 · flowgrain" in page.text
    for heading in (
        "Training reward",
        "Held-out prompts, with 95% confidence interval",
        "Rewards that are not trained",
        "Images before and after training",
        "Parts of the scores",
        "The tree of one prompt",
        "Grid step 0: 3 branches",
    ):
        assert heading in page.text
    assert "One ODE trajectory branches at every stochastic step." in page.text
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    # Two images for each of 6 prompts; per tree the anchor and 3 branches x 2 lengths x 2 steps.
    assert len(page.sources) == 2 * 6 + 2 * (1 + 3 * 2 * 2)


def test_the_settings_on_the_page_are_a_configuration(run, tmp_path):
    text = write_report(run).read_text().split("<pre>")[1].split("</pre>")[0]
    file = tmp_path / "settings.yaml"
    file.write_text(text.replace("&#34;", '"').replace("&#39;", "'"))
    assert yaml.safe_load(file.read_text())["method"]["granularities"] == [1, 2]
    assert load_config(file) == read_run_data(run).config


def test_facts(run):
    data = read_run_data(run)
    first, last = data.evaluations[0], data.evaluations[-1]
    oracle, towers = evaluation_facts(data)
    before, after = (np.array(e.scores["oracle"]) for e in (first, last))
    assert oracle.value == f"{before.mean():.3f} → {after.mean():.3f}"
    difference = confidence_interval(after - before)
    assert f"[{difference.low:+.3f}, {difference.high:+.3f}]" in oracle.meaning
    assert towers.meaning.startswith("towers on 6 held-out images, 4 ODE steps.")
    passes, seconds = training_facts(data)
    assert passes.value == f"{sum(line['forward_passes'] for line in data.steps):,}"
    assert seconds.value.endswith(" s")
    assert [pair.prompt for pair in image_pairs(data)] == first.prompts
    missing = {part.name: part for part in part_changes(data)}["oracle/missing"]
    assert (missing.before, missing.after) == (
        first.parts["oracle/missing"],
        last.parts["oracle/missing"],
    )
    assert missing.percent(0.25) == 25


def test_failures_are_facts(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1] |= {"failed/oracle": 3, "updates/skipped": 1, "reward/oracle": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    meanings = {
        fact.meaning: fact.value for fact in training_facts(read_run_data(tmp_path / "run"))
    }
    assert meanings["images without a score. They were left out of the update"] == "3"
    skipped = "skipped updates, because the loss or the gradient was not finite"
    assert meanings[skipped] == "1"
    Page(write_report(tmp_path / "run").read_text())


def test_a_run_without_a_step(tmp_path):
    write_run(tmp_path, load_config("g2rpo"), [])
    page = Page(write_report(tmp_path).read_text())
    assert "No training step is finished." in page.text
    assert page.sources == []
    with pytest.raises(SettingsError, match="not the directory of a run"):
        write_report(tmp_path / "nothing")


def test_a_reward_that_a_resumed_run_added(run, tmp_path):
    """Only rewards of all evaluations are compared."""
    shutil.copytree(run, tmp_path / "run")
    last = tmp_path / "run" / "evaluations" / "step-000002.json"
    values = json.loads(last.read_text())
    values["scores"]["added"] = values["scores"].pop("towers")
    last.write_text(json.dumps(values))
    data = read_run_data(tmp_path / "run")
    assert data.evaluated_rewards == ["oracle", "preference"]
    assert len(evaluation_facts(data)) == 1
    Page(write_report(tmp_path / "run").read_text())


def test_a_calibrated_run_has_figures_of_the_noise(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rounds = [
        {"psi": [1.0, 0.5], "gained": [0.1, 0.5], "lost": [0.4, 0.2]},
        {"psi": [0.9, 0.6], "gained": [0.2, 0.4], "lost": [0.3, 0.3]},
    ]
    values = {"psi": [0.8, 0.7], "rounds": rounds}
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(values))
    titles = [figure.title for figure in run_figures(read_run_data(tmp_path / "run"))]
    assert titles[-2:] == ["Calibrated noise, 2 rounds", "Reward gained or lost at a step"]


def test_figures_have_the_colors_of_the_page():
    curves = [
        Curve([1, 2, 3], [1.0, 2.0, 1.5], "first", low=[0, 1, 1], high=[2, 3, 2]),
        Curve([1, 2, 3], [2.0, 1.0, 1.5], "second", markers=True, dashed=True),
    ]
    figure = draw_figure("Title", curves, "x", "y", yscale="log", ylim=(0.5, 4))
    assert figure.svg.startswith("<svg")
    assert "currentColor" in figure.svg
    assert "#123456" not in figure.svg
    assert PALETTE[0] in figure.svg
    assert PALETTE[1] in figure.svg
    assert figure == draw_figure("Title", curves, "x", "y", yscale="log", ylim=(0.5, 4))


def test_the_moving_average_is_centered():
    values = np.arange(20.0)
    np.testing.assert_allclose(moving_average(values)[4:-4], values[4:-4])
    assert moving_average(values)[0] == values[:5].mean()
    np.testing.assert_array_equal(moving_average(np.array([3.0])), [3.0])


def test_tiles_of_a_contact_sheet(tmp_path):
    """Also of images that are not square, and of a sheet with empty positions."""
    pixels = np.random.default_rng(0).integers(0, 255, (11, 4, 6, 3), dtype=np.uint8)
    contact_sheet(pixels, 8).save(tmp_path / "sheet.png")
    found = tiles(tmp_path / "sheet.png", 8, 11)
    assert len(found) == 11
    for tile, expected in zip(found, pixels, strict=True):
        np.testing.assert_array_equal(np.asarray(tile), expected)


def test_large_images_are_scaled_down():
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    large = data_uri(Image.fromarray(noise))
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 100_000
    assert data_uri(Image.fromarray(noise[:32, :32])).startswith("data:image/png;base64,")
