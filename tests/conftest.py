"""Shared by all tests: offline, one thread, and a world small enough to train in seconds."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flowgrain.config.schema import Settings, settings

torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Settings:
    """G2RPO on the bundled model, small enough for a step in about a second."""
    return settings(
        {
            "num_steps": 4,
            "group_size": 3,
            "granularities": (1, 2),
            "prompts_per_step": 2,
            "max_steps": 2,
            "eval_prompts": 4,
            "eval_num_steps": 4,
            "eval_rewards": (),
            "learning_rate": 1e-4,
        }
    )
