"""Shared by all tests: no network, one thread, and a configuration that trains in seconds."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from hypothesis import settings

from flowgrain.config import Config, load_config
from flowgrain.methods import METHODS
from flowgrain.models import BACKBONES
from flowgrain.rewards import PAIR_JUDGES, REWARDS

torch.set_num_threads(1)
# A deadline would fail on a machine with other work.
settings.register_profile("flowgrain", deadline=None)
settings.load_profile("flowgrain")

# An example takes long if other processes use the cores.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")


@pytest.fixture(autouse=True)
def imported_files_are_forgotten(tmp_path_factory):
    """Forget modules that a test wrote and imported, and what its plugins registered."""
    registries = (METHODS, REWARDS, PAIR_JUDGES, BACKBONES)
    objects = [dict(registry._objects) for registry in registries]
    modules, path = set(sys.modules), list(sys.path)
    yield
    written = str(tmp_path_factory.getbasetemp())
    new = {
        name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - modules
    }
    for name, file in new.items():
        if str(file).startswith(written):
            del sys.modules[name]
    for registry, before in zip(registries, objects, strict=True):
        for name, thing in list(registry._objects.items()):
            if name not in before and not thing.__module__.startswith("flowgrain."):
                del registry._objects[name]
    sys.path[:] = path


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
            "evaluation.every": 0,
            "evaluation.num_prompts": 4,
            "evaluation.num_steps": 4,
            "evaluation.rewards": [],
            "optimizer.learning_rate": 1e-4,
        },
    )
