"""The numbers of a plan, and that they are those of the trees."""

import pytest

from flowgrain import Trainer
from flowgrain.config import load_config
from flowgrain.methods import price
from flowgrain.planning.plan import RunPlan


def test_numbers_of_known_plans():
    numbers = RunPlan(load_config("g2rpo", {"method.granularities": [1, 2, 3]})).to_dict()
    assert numbers == {
        "method": "g2rpo",
        "forward_passes": 1708,
        "train_forward_passes": 8,
        "decodes": 289,
        "reward_calls": 289,
        "trained_edges": 96,
        "frozen_forward_passes": 0,
        "published_forward_passes": 2188,
        "peak_latents": 393,
    }
    dense = RunPlan(load_config("densegrpo")).to_dict()
    assert dense["calibration_forward_passes"] == 20 * 64 * 55
    assert (dense["forward_passes"], dense["frozen_forward_passes"]) == (1320, 240)


def test_rewards_multiply_reward_calls():
    plan = RunPlan(load_config("g2rpo", ["rewards=[oracle,towers]"]))
    assert plan.cost.reward_calls == 2 * plan.cost.decodes


def test_a_plan_that_varies():
    config = load_config("mixgrpo", {"training.max_steps": 60, "training.prompts_per_step": 3})
    plan = RunPlan(config)
    per_step = [
        price(config.method, config.sampling.num_steps, step=step).forward_passes
        for step in range(1, 61)
    ]
    assert plan.to_dict()["mean_forward_passes"] == pytest.approx(sum(per_step) / 60)
    assert plan.total_forward_passes == 3 * sum(per_step)
    constant = RunPlan(load_config("g2rpo", {"training.max_steps": 5}))
    assert "mean_forward_passes" not in constant.to_dict()
    assert constant.total_forward_passes == 5 * 24 * 1708


@pytest.mark.parametrize("changes", [{}, {"sampling.batch_size": 3}])
def test_peak_latents_are_those_of_a_rollout(tiny, tmp_path, changes):
    config = tiny.with_changes({"training.prompts_per_step": 1, **changes})
    rollout = Trainer(config, tmp_path).collector.collect(1).rollout
    assert RunPlan(config).peak_latents == len(rollout.latents)
