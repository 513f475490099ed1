"""Methods, rewards and backbones in files outside the package, through the command line."""

import json

import pytest
import yaml
from command_line import SMALL, refused, succeeded

METHOD = """
from collections.abc import Mapping
from typing import Any

from pydantic import PrivateAttr
from torch import Tensor

from flowgrain import Planner, PolicyGradient, Tree, register
from flowgrain.core import credit
from flowgrain.core.credit import Normalization
from flowgrain.settings import Setting


@register
class Counting(PolicyGradient):
    '''Trains the first step, and counts how often it assigned credit.'''

    name = "counting"
    title = "Counting"
    first: int = Setting(0, "The stochastic step.", ge=0)
    _calls: int = PrivateAttr(0)

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        root = tree.ode(tree.root(), to=self.first) if self.first else tree.root()
        for branch in tree.sde(root, fan=self.group_size):
            tree.image(tree.ode(branch))

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        self._calls += 1
        return credit.outcome(tree, rewards, how)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self._calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._calls = state["calls"]
"""
REWARD = """
from flowgrain import register_reward

@register_reward("plugin_brightness")
def brightness(images, prompts, *, target: float = 0.5):
    return -(images.mean((1, 2, 3)) - target).abs()
"""
BACKBONE = """
from flowgrain.models import register_backbone
from toy import Toy

register_backbone("plugin_toy")(Toy)
"""


@pytest.fixture
def plugin(directory):
    (directory / "my_method.py").write_text(METHOD)
    return "my_method.py"


def state_of(checkpoint):
    return json.loads((checkpoint / "manifest.json").read_text())["state"]["method"]


def test_a_method_is_trained_and_resumed(plugin, directory):
    words = ("--plugin", plugin, "counting", *SMALL, "method.first=1", "--out", "run")
    assert "counting on shapes: steps 1 to 2, into run\n" in succeeded("train", *words)
    saved = yaml.safe_load((directory / "run/run.yaml").read_text())
    assert saved["config"]["method"]["first"] == 1
    assert saved["config"]["runtime"]["plugins"] == [str(directory / plugin)]
    checkpoints = directory / "run" / "checkpoints"
    assert state_of(checkpoints / "step-000002") == {"calls": 2}
    # The plugin is part of the settings of the run, so --plugin is not needed again.
    succeeded("train", "--resume", "run", "training.max_steps=3")
    assert state_of(checkpoints / "step-000003") == {"calls": 3}


def test_every_command_takes_plugins(directory):
    plugin = "other_method.py"  # a name belongs to one file
    (directory / plugin).write_text(METHOD.replace('"counting"', '"counting_too"'))
    options = ("--plugin", plugin, "counting_too", *SMALL)
    assert json.loads(succeeded("plan", *options, "--json"))["trained_edges"] == 3
    shown = succeeded("config", "show", *options)
    assert "name: counting_too" in shown
    assert "# The stochastic step." in shown
    (directory / "shown.yaml").write_text(shown)
    succeeded("train", "shown.yaml", "--out", "run")
    assert "failed" not in succeeded("doctor", *options)
    words = ("evaluate", "run", "--steps", "2", "--json", "--plugin", plugin)
    assert json.loads(succeeded(*words))["rows"]
    assert "has no option 'frist'" in refused("train", *options, "method.frist=1")


def test_a_reward(directory):
    (directory / "my_reward.py").write_text(REWARD)
    options = ("--plugin", "my_reward.py", "g2rpo", *SMALL)
    reward = "rewards=[{name: plugin_brightness, target: 0.3}]"
    succeeded("train", *options, reward, "--out", "run")
    line = json.loads((directory / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["reward/plugin_brightness"] < 0
    wrong = refused("train", *options, "rewards=[{name: plugin_brightness, traget: 0.3}]")
    assert "Did you mean 'target'" in wrong


def test_a_backbone(directory):
    (directory / "my_backbone.py").write_text(BACKBONE)
    words = ("--plugin", "my_backbone.py", "g2rpo", "model.name=plugin_toy", "rewards=[toy:red]")
    succeeded("train", *words, *SMALL, "--out", "run")
    assert (directory / "run/export").is_dir()


def test_a_plugin_that_fails(directory):
    (directory / "broken.py").write_text("1 / 0\n")
    assert "broken.py: ZeroDivisionError" in refused("train", "--plugin", "broken.py")
