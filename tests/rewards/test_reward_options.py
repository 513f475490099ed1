"""Options of built-in rewards, of custom rewards and of plugins, and errors for wrong options."""

import functools
import sys

import pytest
import torch

from flowgrain.data import as_prompts
from flowgrain.registry import load_plugin
from flowgrain.rewards import (
    REWARDS,
    RewardConfig,
    build_reward,
    register_reward,
    score,
    score_with_parts,
)
from flowgrain.rewards.options import OptionError, check_device
from flowgrain.settings import SettingsError

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = as_prompts(["a", "b", "c"])

PLUGIN = """
from flowgrain.rewards import Explanation, register_reward

@register_reward("brightness")
def brightness(images, prompts, *, target: float = 0.5, channels: tuple[int, ...] = (0, 1, 2)):
    return -(images[:, list(channels)].mean((1, 2, 3)) - target).abs()

@register_reward("Longest-Prompt")
class Longest:
    mean_of_parts = False

    def __init__(self, factor: int, bonus: float | None = None) -> None:
        self.factor, self.bonus = factor, bonus or 0.0

    def __call__(self, images, prompts):
        return [self.factor * len(prompt.text) + self.bonus for prompt in prompts]

    def explain(self, images, prompts):
        import torch
        return Explanation(self(images, prompts), {"all": torch.ones(len(images))})
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "my_rewards.py"
    path.write_text(PLUGIN)
    load_plugin(path)
    return path


def test_a_name_is_short_for_a_mapping():
    assert RewardConfig.model_validate("clip") == RewardConfig(name="clip")
    config = RewardConfig.model_validate({"name": "hps", "weight": 2, "path": "x", "device": "cpu"})
    assert (config.weight, config.batch_size) == (2.0, 256)
    assert config.options == {"path": "x", "device": "cpu"}
    assert RewardConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("wrong", [{"weight": "2"}, {"batch_size": 0}, {"weight": float("inf")}])
def test_fields_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RewardConfig(name="clip", **wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "hps", "chekpoint": "x"},
            r"rewards\[hps\]\.chekpoint='x': unknown option\. Did you mean 'checkpoint'\? "
            r"Options: checkpoint, path, device, allow_pickle\.",
        ),
        (
            {"name": "hps", "allow_pickle": "yes"},
            r"rewards\[hps\]\.allow_pickle='yes': Input should be a valid boolean\. Options: che",
        ),
        ({"name": "clip", "device": 3}, r"rewards\[clip\]\.device=3: .* valid string.*: path, dev"),
        (
            {"name": "remote", "url": "http://h", "reward": "x", "encoding": "jpg"},
            r"rewards\[remote\]\.encoding='jpg': Input should be 'raw' or 'png'\. Options: url, ",
        ),
        (
            {"name": "judge", "url": "http://h", "model": "m", "timeout": 0},
            r"rewards\[judge\]\.timeout=0: Input should be greater than 0\. Options: url, model, ",
        ),
        ({"name": "judge", "url": "http://h"}, r"rewards\[judge\]\.model: this option is required"),
        ({"name": "judge", "urll": "http://h"}, r"Did you mean 'url'"),
        ({"name": "aesthetic"}, r"rewards\[aesthetic\]\.checkpoint: .* required\. Options: check"),
        ({"name": "oracle", "path": "x"}, r"\[oracle\]\.path='x': .*This reward has no options"),
        (
            {"name": "oracle", "weigth": 2},
            r"\[oracle\]\.weigth=2: unknown option\. Did you mean 'weight'\? This reward has no",
        ),
        ({"name": "clip", "batchsize": 2}, r"unknown option\. Did you mean 'batch_size'\?"),
        ({"name": "towers", "folder": "x"}, r"rewards\[towers\]\.folder='x': unknown option"),
        ({"name": "hpss"}, r"there is no reward 'hpss'\. Did you mean 'hps'\?"),
        (
            {"name": "clip", "device": "gpu"},
            r"rewards\[clip\]\.device=gpu: unknown device\. Use cpu",
        ),
        (
            {"name": "clip", "path": None},
            r"rewards\[clip\]\.path=None: Input should be a valid str",
        ),
        ({"name": "clip", "path": {1, 2}}, r"rewards\[clip\]\.path=\{1, 2\}: not a YAML value"),
    ],
)
def test_option_errors_name_the_reward_and_the_option(config, message):
    with pytest.raises(SettingsError, match=message):
        build_reward(RewardConfig(**config))


def test_a_device_must_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=r"rewards\[hps\]\.device=cuda: no GPU is available\."):
        build_reward(RewardConfig(name="hps", device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [check_device(device) for device in ("cpu", "cuda", "cuda:1")] == [
        "cpu",
        "cuda",
        "cuda:1",
    ]
    with pytest.raises(OptionError, match="device=cuda:2: the last GPU is cuda:1"):
        check_device("cuda:2")


def test_a_function_has_its_keyword_only_arguments_as_options(plugin):
    plain = build_reward(RewardConfig(name="brightness"))
    assert torch.equal(plain(IMAGES, PROMPTS), -(IMAGES.mean((1, 2, 3)) - 0.5).abs())
    bound = build_reward(RewardConfig(name="brightness", target=1, channels=[0]))
    assert isinstance(bound, functools.partial)
    assert bound.keywords == {"target": 1.0, "channels": (0,)}  # a YAML list becomes a tuple
    assert torch.equal(bound(IMAGES, PROMPTS), -(IMAGES[:, [0]].mean((1, 2, 3)) - 1).abs())
    for option, message in (
        ({"target": "1"}, r"rewards\[brightness\]\.target='1': .*valid number"),
        ({"target": True}, r"rewards\[brightness\]\.target=True: .*Options: target, channels\."),
        ({"channels": [0, "1"]}, r"rewards\[brightness\]\.channels=\[0, '1'\]: .*valid integer"),
        ({"images": 1}, r"rewards\[brightness\]\.images=1: unknown option\. Options: target, ch"),
    ):
        with pytest.raises(SettingsError, match=message):
            build_reward(RewardConfig(name="brightness", **option))


def test_a_plugin_registers_classes_and_functions(plugin):
    assert "brightness" in REWARDS
    assert "longest_prompt" in REWARDS  # names are compared without case and separators
    load_plugin(plugin)  # the second time has no effect
    reward = build_reward(RewardConfig(name="longest_prompt", factor=2, bonus=0.5))
    assert score(reward, IMAGES, ["a", "bb", "ccc"]).values.tolist() == [2.5, 4.5, 6.5]
    assert score_with_parts(reward, IMAGES, PROMPTS).parts["all"].tolist() == [1, 1, 1]
    with pytest.raises(SettingsError, match=r"rewards\[longest_prompt\]\.factor: .* required"):
        build_reward(RewardConfig(name="longest_prompt", bonus=0.5))
    with pytest.raises(SettingsError, match=r"\.factor=1\.5: Input should be a valid integer"):
        build_reward(RewardConfig(name="longest_prompt", factor=1.5))


@pytest.mark.parametrize("name", ["clip", "brightness"])
def test_a_name_belongs_to_a_single_reward(plugin, name):
    with pytest.raises(SettingsError, match=f"A reward named '{name}' already exists"):

        @register_reward(name)
        def other(images, prompts):
            return [0.0] * len(images)


def test_every_built_in_reward_can_be_imported():
    for name in REWARDS:
        assert callable(REWARDS.get(name)), name


CUSTOM = """
from dataclasses import dataclass

def bright(images, prompts, *, scale: float = 1.0):
    return scale * images.mean((1, 2, 3))

@dataclass
class Constant:
    value: float = 1.0

    def __call__(self, images, prompts):
        return [self.value] * len(images)

class Ready:
    def __call__(self, images, prompts, *, value: int = 3):
        return [value] * len(images)

class Loose:
    def __init__(self, **options):
        self.options = options

    def __call__(self, images, prompts):
        return [0.0] * len(images)

class Broken:
    def __init__(self, value: float = 0.0):
        raise RuntimeError("no connection")

class Empty:
    pass

class Weighted:
    def __init__(self, weight: float = 1.0):
        pass

ready = Ready()
number = 3
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A module in the current directory."""
    (tmp_path / "custom_rewards.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "custom_rewards"
    sys.modules.pop("custom_rewards", None)


def test_a_custom_reward_by_its_path(custom):
    first = sys.path[0]

    def scores(attribute, **options):
        reward = build_reward(RewardConfig(name=f"{custom}:{attribute}", **options))
        return score(reward, IMAGES, PROMPTS).values

    assert torch.equal(scores("bright"), IMAGES.mean((1, 2, 3)))
    assert sys.path[0] == first  # installed packages come before the working directory
    assert torch.equal(scores("bright", scale=2), 2 * IMAGES.mean((1, 2, 3)))
    assert scores("Constant").tolist() == [1, 1, 1]
    assert scores("Constant", value=2.5).tolist() == [2.5] * 3
    assert scores("ready").tolist() == [3] * 3
    assert scores("ready", value=4).tolist() == [4] * 3
    assert scores("Loose", anything=[1]).tolist() == [0] * 3


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("number", {}, r"rewards\[custom_rewards:number\]: an object of type int is not callable"),
        ("none", {}, r"rewards\[custom_rewards:none\]: cannot be imported: .*no attribute 'none'"),
        ("Empty", {}, r"rewards\[custom_rewards:Empty\]: .*type Empty is not callable"),
        ("Broken", {}, r"rewards\[custom_rewards:Broken\]: RuntimeError: no connection"),
        ("Broken", {"value": "x"}, r"rewards\[custom_rewards:Broken\]\.value='x': .*valid number"),
        ("ready", {"value": "x"}, r"rewards\[custom_rewards:ready\]\.value='x': .*valid integer"),
        ("bright", {"scala": 1}, r"\.scala=1: unknown option\. Did you mean 'scale'\?"),
        ("Weighted", {}, r"Weighted\]\.weight: every reward has a setting with this name"),
    ],
)
def test_errors_of_custom_rewards(custom, attribute, options, message):
    with pytest.raises(SettingsError, match=message):
        build_reward(RewardConfig(name=f"{custom}:{attribute}", **options))


def test_a_module_that_does_not_exist():
    with pytest.raises(SettingsError, match=r"rewards\[no_such_module:x\]: cannot be imported"):
        build_reward(RewardConfig(name="no_such_module:x"))


def test_types_that_only_exist_for_type_checkers(tmp_path, monkeypatch):
    text = (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from torch import Tensor\n"
        "def bright(images: Tensor, prompts, *, scale: float = 1.0):\n"
        "    return [scale] * len(images)\n"
    )
    (tmp_path / "typed_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert build_reward(RewardConfig(name="typed_rewards:bright"))(IMAGES, PROMPTS) == [1.0] * 3
    with pytest.raises(SettingsError, match=r"'Tensor' is not defined.*outside of TYPE_CHECKING"):
        build_reward(RewardConfig(name="typed_rewards:bright", scale=2.0))
