"""Every method plans and trains three steps on the bundled model, with all parameters or a LoRA."""

import json
import math

import pytest
import torch
from command_line import succeeded

from flowgrain import METHODS, Trainer, load_config

OPTIONS = {
    "branchgrpo": {
        "method.node_value": "softmax",
        "method.split_steps": [0, 1],
        "method.updates_per_rollout": 2,
    },
    "ddpo": {"method.min_count": 5},
    "densegrpo": {"method.calibration.rounds": 1, "method.calibration.samples": 2},
    "e_grpo": {"method.sde_steps": [0, 1], "method.merged_steps": [1, 2]},
    "flow_grpo_fast": {"method.window_size": 2},
    "mixgrpo": {"method.window_size": 2},
    "mixgrpo_flash": {"method.window_size": 2},
    "mixgrpo_flash_star": {"method.window_size": 2},
}
"""Options that fit four steps, or that make a run short."""


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_json(method):
    numbers = json.loads(succeeded("plan", method, "--json"))
    assert numbers["method"] == method


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_three_steps(tmp_path, method, rank):
    changes = {
        "sampling.num_steps": 4,
        "method.group_size": 4,
        "training.prompts_per_step": 2,
        "training.max_steps": 3,
        "evaluation.every": 0,
        "evaluation.rewards": [],
        "lora.rank": rank,
        **OPTIONS.get(method, {}),
    }
    trainer = Trainer(load_config(method, changes), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    lines = trainer.train()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    assert all(line["updates/skipped"] == 0 for line in lines)
    assert trainer.policy.lora == (rank > 0)
    after = trainer.policy.parameters
    assert any(not torch.equal(after[name], p) for name, p in before.items())
