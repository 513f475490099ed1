"""Shared by all tests: no network, one thread, and a configuration that trains in seconds."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flowgrain.config import Config, load_config

torch.set_num_threads(1)


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
