"""The commands `evaluate`, `sample`, `report` and `compare`, which use trained models."""

import json

import pytest
from command_line import flowgrain, refused, succeeded
from PIL import Image

from flowgrain.studies import measure


def test_evaluate(run, directory):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = json.loads(succeeded("evaluate", run, "--steps", "4", "--json"))
    oracle = table["rows"][0]["cells"]["oracle"]["value"]["mean"]
    assert oracle == pytest.approx(metrics[-1]["eval/oracle"])
    assert len(list((directory / "evaluations").iterdir())) == 1
    output = succeeded("evaluate", "base", run, "--steps", "2", "--out", "here")
    assert "difference to the first model" in output
    files = {path.name for path in (directory / "here").iterdir()}
    assert files >= {"scores.parquet", "table.md", "table.json", "index.html"}


def test_evaluate_a_backbone(directory):
    words = ("shapes", "evaluation.num_prompts=4", "--steps", "2", "--seeds", "0,1", "--images")
    table = json.loads(succeeded("evaluate", *words, "--out", "run", "--json"))
    assert table["rows"][0]["cells"]["oracle"]["scored"] == 8
    assert len(list((directory / "run" / "images").rglob("*.png"))) == 8


def test_sample(run, directory):
    words = ("--prompt", "three green circles", "--prompt", "red square and blue circle")
    output = succeeded("sample", run, *words, "--steps", "2", "--seed", "1", "--out", "a/two.png")
    assert output == "wrote a/two.png\n"
    with Image.open("a/two.png") as image:
        assert image.size == (512, 256)
    succeeded("sample", "shapes", "--prompt", "three green circles", "--steps", "2")
    assert (directory / "sample.png").exists()


def test_report(run):
    (run / "report.html").unlink()
    assert succeeded("report", run) == f"wrote {run / 'report.html'}\n"
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "shapes", "--steps", "0"], "--steps=0"),
        (["evaluate", "shapes", "--seeds", "a"], "--seeds=a"),
        (["evaluate", "evaluation.num_prompts=3"], "no model"),
        (["evaluate", "nowhere"], "nowhere: there is no such model"),
        (["evaluate", "shapes", "evaluation.num_promts=3"], "evaluation.num_prompts"),
        (["sample", "shapes", "--prompt", "a cat"], "three green circles"),
        (["sample", "shapes", "base", "--prompt", "a cat"], "sample takes one model"),
        (
            ["sample", "shapes", "--prompt", "three green circles", "--out", "a.xyz"],
            "End it in .png",
        ),
        (["report", "nowhere"], "nowhere"),
        (["compare", "nothing"], "There is no comparison or file 'nothing'"),
        (["compare", "quick", "--seeds", "x", "--dry-run"], "--seeds=x"),
        (["compare", "quick", "--json"], "only works with --dry-run"),
    ],
)
def test_words_that_cannot_be_used(directory, words, message):
    assert message in refused(*words)
    assert list(directory.iterdir()) == []


COMPARISON = """
name: small
methods: {g2rpo: {}, flow_grpo: {}}
rewards: {towers: [towers]}
seeds: [1]
budget: 300
common:
  sampling: {num_steps: 4, batch_size: 32}
  method: {group_size: 2}
  training: {prompts_per_step: 2}
measurement: {num_steps: [2], num_prompts: 4}
curve_points: 1
"""


@pytest.mark.slow
def test_compare(directory, monkeypatch):
    speed = {"passes": 100.0, "decodes": 100.0, "scores": 100.0}  # measuring it takes seconds
    monkeypatch.setattr(measure, "machine_speed", lambda config: speed)
    (directory / "small.yaml").write_text(COMPARISON)
    cost = json.loads(succeeded("compare", "small.yaml", "--dry-run", "--json"))
    assert [run["name"] for run in cost["runs"]] == ["g2rpo+towers+1", "flow_grpo+towers+1"]
    assert "units in total" in succeeded("compare", "small.yaml", "--dry-run")
    assert {path.name for path in directory.iterdir()} == {"small.yaml"}
    result = flowgrain("compare", "small.yaml", "--methods", "g2rpo", "--jobs", "1")
    assert result.status == 0, result.stderr
    assert result.stdout.startswith("open comparisons/small/")
    assert "2/2 g2rpo+towers+1" in result.stderr
    assert succeeded("report", "comparisons/small").startswith("wrote comparisons/small/")
