"""Three steps on the bundled model, with all parameters and with a LoRA."""

import math

import pytest
import torch

from flowgrain import Trainer, load_config

OPTIONS = {
    "branchgrpo": {
        "method.node_value": "softmax",
        "method.split_steps": [0, 1],
        "method.group_size": 4,
        "method.updates_per_rollout": 2,
    },
    "ddpo": {"method.min_count": 5},
    "e_grpo": {"method.sde_steps": [0, 1], "method.merged_steps": [1, 2]},
    "flow_dppo": {},
    "stepwise_flow_grpo": {},
    "tp_grpo": {},
}


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("method", OPTIONS)
def test_three_steps(tmp_path, method, rank):
    changes = {
        "sampling.num_steps": 4,
        "method.group_size": 4,
        "training.prompts_per_step": 2,
        "training.max_steps": 3,
        "evaluation.every": 0,
        "evaluation.rewards": [],
        "lora.rank": rank,
        **OPTIONS[method],
    }
    trainer = Trainer(load_config(method, changes), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    lines = [trainer.step(step) for step in (1, 2, 3)]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert all(line["updates/skipped"] == 0 for line in lines)
    assert trainer.policy.lora == (rank > 0)
    after = trainer.policy.parameters
    assert any(not torch.equal(after[name], p) for name, p in before.items())
