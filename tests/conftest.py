"""Shared by all tests: no network, one thread, and a configuration that trains in seconds."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flowgrain.config import Config, load_config
from flowgrain.methods import METHODS
from flowgrain.models import BACKBONES
from flowgrain.rewards import REWARDS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def plugins_are_forgotten():
    """Remove what a test's plugins registered, so that no test depends on another."""
    registries = (METHODS, REWARDS, BACKBONES)
    before = [dict(registry._objects) for registry in registries]
    modules = set(sys.modules)
    yield
    loaded = [name for name in set(sys.modules) - modules if name.startswith("flowgrain_plugin_")]
    if loaded:
        for registry, objects in zip(registries, before, strict=True):
            registry._objects = objects
        for name in loaded:
            del sys.modules[name]


@pytest.fixture
def tiny() -> Config:
    """G2RPO on the bundled model. A training step takes about a second."""
    return load_config(
        "g2rpo",
        {
            "sampling.num_steps": 4,
            "method.group_size": 3,
            "method.granularities": [1, 2],
            "training.prompts_per_step": 2,
            "training.max_steps": 2,
            "evaluation.num_prompts": 4,
            "evaluation.num_steps": 4,
            "evaluation.rewards": [],
            "optimizer.learning_rate": 1e-4,
        },
    )
