"""Files from others: no references to the environment; plugins are found beside the file."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from flowgrain import PolicyGradient, SettingsError, load_config
from flowgrain.settings import Setting

PLUGIN = """
from flowgrain import register
from flowgrain.methods.flow_grpo import FlowGRPO

@register
class Beside(FlowGRPO):
    name = "beside_the_file"
"""


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a-${runtime.seed}", "???"])
def test_references_are_refused(value, tmp_path):
    with pytest.raises(SettingsError, match="references are not supported"):
        load_config("demo", {"data.prompts": value})
    file = tmp_path / "mine.yaml"
    file.write_text(f"method: {{name: g2rpo}}\nrewards:\n- {{name: remote, url: '{value}'}}\n")
    with pytest.raises(SettingsError, match=r"rewards\.0\.url=.*references are not supported"):
        load_config(file)


def test_plugins_are_found_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "beside.py").write_text(PLUGIN)
    file = tmp_path / "files" / "mine.yaml"
    file.write_text("method: {name: beside_the_file}\nruntime: {plugins: [beside.py]}\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(file)
    assert config.runtime.plugins == (str(tmp_path / "files" / "beside.py"),)
    assert load_config(Path("files/mine.yaml")) == config


def test_names_that_leave_the_directory_of_runs_are_refused():
    for name in ("..", ".", "a/b"):
        with pytest.raises(SettingsError, match="name="):
            load_config("demo", {"name": name})


def test_the_settings_of_a_section_are_listed():
    with pytest.raises(SettingsError, match=r"optimizer\.lr is not .* learning_rate, "):
        load_config("demo", {"optimizer.lr": 1})


def test_a_subclass_may_narrow_the_type_of_an_option():
    class Narrow(PolicyGradient):
        name = "narrow"
        group_size: Literal[4] = 4
        clip_range: float = Setting(0.3, "Clip range.", le=0.5)
        eta: float = 0.5

        def plan(self, tree, step, seed):
            """No tree."""

    assert Narrow.model_fields["eta"].description == PolicyGradient.model_fields["eta"].description
    for wrong in ({"group_size": 5}, {"clip_range": 0.9}, {"eta": 0.0}):
        with pytest.raises(ValidationError):
            Narrow(**wrong)
