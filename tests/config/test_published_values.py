"""The resolved settings of every recipe against a table of published values."""

from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from flowgrain import load_config
from flowgrain.config.load import recipe_names
from flowgrain.models.base import BACKBONES
from flowgrain.models.published import PUBLISHED

TABLE = yaml.safe_load((Path(__file__).parent / "published_values.yaml").read_text())
CHECKS = [(name, group) for name, groups in TABLE["recipes"].items() for group in groups]


@cache
def lora_layers(path, backbone, target_modules):
    """Number of layers of the published architecture that peft adapts."""
    from peft import LoraConfig

    config = dict(PUBLISHED[path]["transformer"])
    with torch.device("meta"):
        transformer = getattr(diffusers, config["_class_name"]).from_config(config)
    assert isinstance(transformer, SD3Transformer2DModel | FluxTransformer2DModel)
    targets = list(target_modules or BACKBONES.get(backbone).lora_targets)
    transformer.add_adapter(LoraConfig(r=1, target_modules=targets, init_lora_weights=False))
    return sum(name.endswith("lora_A.default") for name, _ in transformer.named_modules())


def effective(config, name):
    """A value that the package derives from the settings."""
    if name == "learning_rate":
        return config.learning_rate
    if name == "shift":
        # The second level of the grid, 1 - 1 / T before the shift.
        level, second = 1 - 1 / config.sampling.num_steps, float(config.sigmas()[1])
        return round(second * (1 - level) / (level * (1 - second)), 3)
    if name == "rewards":
        weights = config.method.mix_weights(config.reward_weights)
        return {reward: round(weight, 7) for reward, weight in weights.items()}
    if name == "stochastic_steps":
        tree = config.tree()
        return sorted({int(k) - 1 for k in tree.grid_index[tree.edges]})
    if name == "lora_alpha":
        return config.lora.alpha or 2.0 * config.lora.rank
    if name == "published_passes":
        return config.method.published_passes(config.sampling.num_steps)
    assert name == "lora_layers"
    return lora_layers(config.model.path, config.model.name, config.lora.target_modules)


def resolved(config, path):
    """The value at a path of the table, as plain YAML types."""
    section, _, option = path.partition(".")
    if section == "effective":
        return effective(config, option)
    if section.startswith("rewards["):
        of_name = {reward.name: reward for reward in config.rewards}
        return of_name[section[len("rewards[") : -1]].options[option]
    return config.to_dict()[section][option]


def test_the_table_has_every_recipe():
    assert set(TABLE["recipes"]) == {name for name in recipe_names() if "/" in name}
    used = {group for _, group in CHECKS}
    assert used == set(TABLE["groups"])
    assert all(group["source"] for group in TABLE["groups"].values())


@pytest.mark.parametrize(("name", "group"), CHECKS)
def test_a_recipe_has_the_published_values(name, group):
    config, published = load_config(name), TABLE["groups"][group]["values"]
    assert {path: resolved(config, path) for path in published} == published
