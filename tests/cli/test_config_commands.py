"""The commands `recipes`, `config show` and `config diff`."""

import json
from itertools import pairwise

import pytest
from command_line import SMALL, flowgrain, refused, succeeded

from flowgrain.config import load_config
from flowgrain.config.load import recipe_names
from flowgrain.methods import METHODS


def test_recipes():
    recipes = json.loads(succeeded("recipes", "--json"))
    assert [recipe["name"] for recipe in recipes] == recipe_names()
    keys = ("title", "paper", "source", "task", "hardware", "cost", "published")
    assert all(recipe[key] for recipe in recipes for key in keys)
    shown = "".join(succeeded("recipes").split())
    for recipe in recipes:
        for key in ("name", "title", "paper", "source", "task", "published"):
            assert "".join(recipe[key].split()) in shown, (recipe["name"], key)
    one = succeeded("recipes", "flux/g2rpo")
    assert "hardware" in one
    assert "flux/g2rpo_hps" not in one
    some = json.loads(succeeded("recipes", "sd3/", "--json"))
    assert [recipe["name"] for recipe in some] == [n for n in recipe_names() if n[:4] == "sd3/"]
    assert "Did you mean 'flux/g2rpo'?" in refused("recipes", "flux/g2rpoo")


FAST = ("demo", "flux/g2rpo", "sd3/mend", "sd3/diffusion_dpo", "densegrpo", "draft", "mixgrpo")


@pytest.mark.parametrize(
    "source",
    [
        source if source in FAST else pytest.param(source, marks=pytest.mark.slow)
        for source in [*recipe_names(), *METHODS]
    ],
)
def test_the_shown_file_gives_the_same_configuration(directory, source):
    text = succeeded("config", "show", source)
    (directory / "shown.yaml").write_text(text)
    assert load_config("shown.yaml") == load_config(source)
    (directory / "again.yaml").write_text(succeeded("config", "show", "shown.yaml"))
    assert (directory / "again.yaml").read_text() == text


def test_values_that_need_quotes(directory):
    changes = {
        "data.prompts": "a: b #c.txt",
        "optimizer.learning_rate": 1e-7,
        "rewards": [{"name": "judge", "url": "http://a:1/v1", "model": "m, n", "weight": 0.5}],
        "runtime.trackers": ["wandb"],
        "method.psi": [0.1] * 10,
        "method.sde_type": "calibrated_sde",
    }
    config = load_config("flow_grpo", changes)
    words = [f"{path}={json.dumps(value)}" for path, value in changes.items()]
    text = succeeded("config", "show", "flow_grpo", *words)
    (directory / "shown.yaml").write_text(text)
    assert load_config("shown.yaml") == config


def test_comments_are_descriptions_with_units():
    text = succeeded("config", "show", "g2rpo", "method.group_size=8")
    assert "  # Samples per prompt that are compared with each other (G). Unit: samples.\n" in text
    assert "  group_size: 8\n" in text
    lines = [line.strip() for line in text.splitlines() if line]
    without = [
        line
        for before, line in pairwise(lines)
        if not line.startswith(("#", "-")) and not before.startswith("#")
    ]
    assert without == ["name: g2rpo"]  # the method's, below `method:`


def test_the_shown_file_can_be_trained(directory):
    (directory / "shown.yaml").write_text(succeeded("config", "show", "g2rpo", *SMALL))
    succeeded("train", "shown.yaml", "--out", "one")
    succeeded("train", "g2rpo", *SMALL, "--out", "two")
    one, two = (
        [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["loss"] for line in one] == [line["loss"] for line in two]


def test_differences():
    found = json.loads(succeeded("config", "diff", "g2rpo", "flow_grpo", "--json"))
    by_path = {entry["path"]: (entry["left"], entry["right"]) for entry in found}
    assert by_path["method.name"] == ("g2rpo", "flow_grpo")
    assert by_path["method.granularities"] == ("[1, 2, 3]", "-")
    assert by_path["sampling.num_steps"] == ("16", "10")
    assert "method.eta" not in by_path
    assert "The settings are equal." in succeeded("config", "diff", "g2rpo", "g2rpo")


def test_differences_to_a_run(run, directory):
    table = succeeded("config", "diff", "flux/g2rpo", run)
    assert "model.path" in table
    assert "rewards[hps].weight" in table
    (directory / "other.yaml").write_text("method: {name: g2rpo, eta: 0.5}\nname: g2rpo\n")
    found = json.loads(succeeded("config", "diff", "g2rpo", "other.yaml", "--json"))
    assert found == [{"path": "method.eta", "left": "0.7", "right": "0.5"}]


def test_wrong_sources():
    assert "Did you mean 'g2rpo'" in refused("config", "show", "g2rp")
    assert "There is no recipe" in refused("config", "diff", "g2rpo", "nowhere")
    assert flowgrain("config", "diff", "g2rpo").status == 2
