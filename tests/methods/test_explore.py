"""Exploration in a training step: which samples are trained, what is counted, what is refused."""

import math

import pytest
import torch
from toy import red
from toy_trainer import toy_config, toy_trainer

from flowgrain import RunStopped, SettingsError
from flowgrain.planning.plan import RunPlan, prompt_cost

OF_METHOD = {
    "flow_grpo": {},
    "g2rpo": {"method.granularities": [1, 2]},
    "diffusionnft": {"method.tail_order": 1},
    "mixgrpo": {"method.window_size": 2},
}
EXPLORE = {"sampling.explore.candidates": 9, "sampling.explore.num_steps": 2}


def config_of(method, changes=None):
    return toy_config(method, {**OF_METHOD[method], **EXPLORE, **(changes or {})})


@pytest.mark.parametrize("method", OF_METHOD)
def test_without_a_choice_the_images_are_those_of_the_plain_run(tmp_path, method):
    """As many candidates as samples, which the settings refuse: nothing is left to choose."""
    plain = toy_config(method, OF_METHOD[method])
    sampling, size = plain.sampling, plain.method.group_size
    every = sampling.explore.model_copy(update={"candidates": size, "num_steps": 5})
    sampling = sampling.model_copy(update={"explore": every})
    explored = plain.model_copy(update={"sampling": sampling})
    collector = toy_trainer(plain, tmp_path).collector
    one = collector.collect(1)
    collector.config = explored
    other = collector.collect(1)
    assert other.metrics["explore/forward_passes"]
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.advantage, other.advantage)
    edges = one.tree.edges
    assert torch.equal(one.rollout.at(edges), other.rollout.at(edges))


@pytest.mark.parametrize("chunk", [None, 1])
def test_the_best_and_the_worst_candidates_are_trained(tmp_path, chunk):
    """A method that samples by the ODE: with all steps, a candidate is its exact image."""
    changes = {"sampling.explore.num_steps": 5, "sampling.prompts_per_chunk": chunk}
    batch = toy_trainer(config_of("diffusionnft", changes), tmp_path / "a").collector.collect(1)
    all_of_them = toy_config("diffusionnft", {**OF_METHOD["diffusionnft"], "method.group_size": 9})
    everything = toy_trainer(all_of_them, tmp_path / "b").collector.collect(1)
    total = (everything.scores["red"].values + 0.5 * everything.scores["green"].values).reshape(
        2, 9
    )
    images = everything.images.reshape(2, 9, -1)
    for prompt in range(2):
        ranked = total[prompt].argsort()
        chosen = sorted([int(ranked[0]), int(ranked[-2]), int(ranked[-1])])
        expected = images[prompt, chosen]
        found = batch.images.reshape(2, 3, -1)[prompt]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert batch.metrics["explore/spearman"] == pytest.approx(1)
    assert batch.metrics["explore/best_above_median"] == pytest.approx(0.5)  # of 2, 1 is the median


@pytest.mark.parametrize("method", OF_METHOD)
def test_the_plan_counts_what_a_step_counts(tmp_path, method):
    config = config_of(method)
    metrics = toy_trainer(config, tmp_path).step(1)
    cost, numbers = prompt_cost(config), RunPlan(config).to_dict()
    assert metrics["forward_passes"] == 2 * cost.forward_passes
    assert metrics["decodes"] == 2 * cost.decodes
    assert metrics["explore/forward_passes"] == 2 * numbers["explore_forward_passes"]
    assert metrics["explore/decodes"] == 2 * numbers["explore_decodes"]
    assert cost.reward_calls == 2 * cost.decodes  # two rewards
    groups = 2 if method == "g2rpo" else 1
    assert numbers["explore_decodes"] == 9 * groups
    assert -1 <= metrics["explore/spearman"] <= 1
    plain = prompt_cost(toy_config(method, OF_METHOD[method]))
    assert cost.forward_passes - plain.forward_passes == numbers["explore_forward_passes"]
    assert cost.passes - plain.passes == numbers["explore_forward_passes"]
    if not config.method.plan_varies:
        assert RunPlan(config).total_forward_passes == 2 * 100 * cost.forward_passes


def failing(every):
    calls = []

    def reward(images, prompts):
        scores = red(images, prompts).clone()
        if not calls:  # only candidates
            scores[::every] = torch.nan
        calls.append(len(scores))
        return scores

    return reward


@pytest.mark.parametrize("method", ["flow_grpo", "g2rpo", "mixgrpo"])
def test_graphs_of_the_exact_samples_are_reused(tmp_path, method):
    """Candidates keep no graph. The update is that of a second forward pass."""
    one_update = {"method.updates_per_rollout": 1}
    plain = toy_trainer(config_of(method, one_update), tmp_path / "plain")
    config = config_of(method, {**one_update, "training.graph_memory": "all"})
    reusing = toy_trainer(config, tmp_path / "reusing")
    expected, metrics = plain.step(1), reusing.step(1)
    assert metrics["reused_forward_passes"] == expected["train_forward_passes"] > 0
    assert metrics["train_forward_passes"] == 0
    for name in ("forward_passes", "decodes", "explore/spearman", "ratio/mean"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    for name, value in plain.policy.parameters.items():
        torch.testing.assert_close(reusing.policy.parameters[name], value, atol=1e-5, rtol=1e-5)


def test_candidates_without_a_score_are_not_chosen(tmp_path):
    config = config_of("flow_grpo", {"rewards": ["mine"]})
    trainer = toy_trainer(config, tmp_path, rewards={"mine": failing(9)})
    metrics = trainer.step(1)
    assert metrics["explore/failed"] == 2  # the first candidate of both prompts
    assert metrics["failed/mine"] == 0
    assert math.isfinite(metrics["explore/spearman"])


def test_too_many_candidates_without_a_score_stop_the_run(tmp_path):
    config = config_of("flow_grpo", {"rewards": ["mine"]})
    trainer = toy_trainer(config, tmp_path, rewards={"mine": failing(2)})
    with pytest.raises(RunStopped, match="failed on 9 of 18 images"):
        trainer.step(1)


REFUSED = [
    ("draft", {}, "does not compare images"),
    ("mend", {}, "does not compare images"),
    ("sft", {}, "the best image of every prompt only"),
    ("ddpo", {}, "earlier rewards of the prompt"),
    ("branchgrpo", {"method.split_steps": [0, 1], "method.group_size": 4}, "has branches itself"),
    ("flow_grpo", {"sampling.explore.candidates": 3}, "Use more than 3, for example 12"),
    ("flow_grpo", {"sampling.explore.candidates": 0}, "num_steps=2: has no effect"),
    ("flow_grpo", {"sampling.explore.num_steps": 6}, "num_steps=6: more than .* Use at most 5"),
    ("flow_grpo", {"training.adaptive_groups.probe": 2}, "not possible together"),
    ("g2rpo", {"sampling.explore.candidates": 10_000}, "rows per prompt. Use a smaller value"),
    ("diffusionnft", {"sampling.explore.tail_weights": "int8"}, "no approximate copy. Use same"),
    (
        "g2rpo",
        {"sampling.explore.tail_cache": "taylorseer:2", "runtime.compile": "inductor"},
        "Remove one of the two",
    ),
    ("sft", {"data.images": "x.jsonl", "method.group_size": 24}, "no images are sampled"),
    (
        "flow_grpo",
        {"sampling.explore.tail_cache": "first_block:0.1", "sampling.explore.num_steps": 1},
        "completed in 1 step. Remove it",
    ),
    ("flow_grpo", {"sampling.explore.tail_cache": "taylorseer:2"}, "completed in 2 steps"),
]


@pytest.mark.parametrize(("method", "changes", "message"), REFUSED)
def test_refused(method, changes, message):
    usual = {"method.kl_weight": 0.0, "rewards": ["red"]}
    if method == "draft":
        usual["method.group_size"] = 1
    with pytest.raises(SettingsError, match=message):
        toy_config(method, {**EXPLORE, **usual, **changes})


def test_approximate_candidates(tiny, tmp_path):
    """The bundled model. Exact samples do not use the cache of the candidates."""
    from flowgrain import Trainer

    explore = {f"sampling.explore.{k}": v for k, v in (("candidates", 6), ("num_steps", 4))}
    cached = {**explore, "sampling.explore.tail_cache": "taylorseer:2"}
    first = {"method.sde_steps": [0], "method.granularities": [1]}
    exact, cheap = (
        Trainer(tiny.with_changes({**first, **changes}), tmp_path / name)
        for name, changes in (("exact", explore), ("cheap", cached))
    )
    assert exact.collector.cheap is exact.collector
    assert cheap.collector.cheap.tails.cache == "taylorseer:2"
    assert cheap.collector.tails.cache == "none"
    one, other = exact.collector.collect(1), cheap.collector.collect(1)
    assert other.metrics["explore/spearman"] != one.metrics["explore/spearman"]
    assert other.metrics["explore/forward_passes"] == one.metrics["explore/forward_passes"]


def test_a_cache_that_the_model_does_not_support(tmp_path):
    cached = {"sampling.explore.tail_cache": "taylorseer:2", "sampling.explore.num_steps": 5}
    config = config_of("g2rpo", cached)
    with pytest.raises(SettingsError, match=r"sampling\.explore\.tail_cache=taylorseer:2"):
        toy_trainer(config, tmp_path)
