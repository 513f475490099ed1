"""Costs: the published tables, and what runs is what `price` announces."""

import numpy as np
import pytest
from toy import PROMPTS, Toy, red
from toy_trainer import P

from flowgrain.config import load_config
from flowgrain.core.cost import cost
from flowgrain.methods import METHODS, Repair, plan_tree, price
from flowgrain.training import Trainer

COUNTED = ("forward_passes", "train_forward_passes", "frozen_forward_passes", "decodes")


@pytest.mark.parametrize(
    ("strides", "passes", "published"),
    [([1], 1120, 1216), ([1, 2], 1504, 1792), ([1, 2, 3], 1708, 2188)],
)
@pytest.mark.parametrize("anchor", [True, False])
def test_g2rpo_costs_the_minimum(strides, passes, published, anchor):
    config = load_config("g2rpo", {"method.granularities": strides, "method.anchor_image": anchor})
    counted = cost(config.tree())
    assert counted.forward_passes == passes - (0 if anchor else 8)
    assert config.method.published_passes(16) == published
    assert counted.train_forward_passes == 8
    assert counted.trained_edges == 96


PASSES = {  # sampling forward passes per prompt with the papers' values: ours, published code
    "g2rpo": (16, 1708, 2188),
    "densegrpo": (10, 24 * 55, 24 * 65),
    "flow_grpo": (10, 240, 240),
    "dancegrpo": (16, 181, 192),
    "mixgrpo": (25, 289, 300),
    "mixgrpo_flash": (25, 133, 132),  # the published tail is one step shorter
    "mixgrpo_flash_star": (25, 85, 84),
    "tempflow_grpo": (10, 4 * 279, 4 * 279),  # of four initial noises
    "grpo_guard": (10, 240, 240),
    "diffusionnft": (10, 240, 240),
    "mend": (10, 240, 240),
    "flow_dppo": (10, 160, 160),
    "ddpo": (50, 400, 400),
    "diffusion_dpo": (40, 960, 960),
    # 16 of the trunk, and the completions of 12 branches from grid indices 1, 2, 4 and 7. The
    # published completions of merged steps have as many passes as after a step of length 1.
    "e_grpo": (16, 16 + 12 * (15 + 14 + 12 + 9), 16 + 12 * (1 + 15 + 1 + 14 + 1 + 13 + 1 + 11)),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_of_the_papers(name):
    num_steps, ours, published = PASSES[name]
    config = load_config(name)
    assert config.sampling.num_steps == num_steps
    assert price(config.method, num_steps).forward_passes == ours
    assert config.method.published_passes(num_steps) == published


def test_mixgrpo_needs_228_passes_over_its_first_twelve_windows():
    method = load_config("mixgrpo").method
    passes = [price(method, 25, step=1 + 25 * i).forward_passes for i in range(12)]
    assert np.mean(passes) == 228.5


def test_densegrpo_decodes_eleven_images_per_trajectory():
    method = load_config("densegrpo").method
    assert price(method, 10).decodes == 11 * method.group_size


def test_plans_that_vary_with_the_step_say_so():
    for name in METHODS:
        config = load_config(name)
        num_steps = config.sampling.num_steps
        trees = {plan_tree(config.method, num_steps, step) for step in range(1, 60, 5)}
        assert config.method.plan_varies == (len(trees) > 1), name


def assert_priced(config, out, steps) -> list[dict]:
    """Train `steps` steps, whose metrics must have the costs of `price`. Returns the metrics.

    The price of candidates is that of a rollout in which all images get them.
    """
    given = {"backbone": Toy(), "prompts": PROMPTS, "eval_prompts": PROMPTS}
    trainer = Trainer(config, out, rewards={"red": red}, **given)
    lines = []
    for step in steps:
        metrics = trainer.step(step)
        expected = price(
            trainer.method,
            config.sampling.num_steps,
            prompts_per_step=P,
            step=step,
            seed=config.runtime.seed,
        )
        counted = dict(metrics)
        if isinstance(trainer.method, Repair):
            images = P * trainer.method.group_size
            without = (images - metrics["repair/failing"]) * trainer.method.num_candidates
            assert 0 < without < images * trainer.method.num_candidates
            counted["decodes"] += without
        for name in COUNTED:
            assert counted[name] == P * getattr(expected, name), name
        lines.append(metrics)
    return lines


SHORT = {
    "training.prompts_per_step": P,
    "optimizer.learning_rate": 1e-3,
    "evaluation.rewards": [],
}


@pytest.mark.parametrize("name", METHODS)
def test_executed_is_priced_and_the_first_ratio_is_one(name, tmp_path):
    """With the paper's values, except that there are few prompts and one update per rollout."""
    changes = {**SHORT, "method.updates_per_rollout": 1}
    if name == "densegrpo":
        changes |= {"method.calibration.rounds": 1, "method.calibration.samples": 2}
    for metrics in assert_priced(load_config(name, changes), tmp_path, (1, 2)):
        assert metrics.get("ratio/max", 1) == metrics.get("ratio/mean", 1) == 1


@pytest.mark.parametrize("updates", [2, "per_step"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_several_updates_are_priced(updates, kl_weight, tmp_path):
    changes = {"method.updates_per_rollout": updates, "method.kl_weight": kl_weight}
    lines = assert_priced(load_config("flow_grpo", {**SHORT, **changes}), tmp_path, (1,))
    assert lines[0]["updates"] == (2 if updates == 2 else 9)
