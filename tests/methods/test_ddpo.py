"""DDPO's running statistics: against published code's rule, stopped steps, and exact resumes."""

import math
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_trainer import WEIGHTS, P, toy_config, toy_trainer

from flowgrain.methods.running_statistics import RunningStatistics
from flowgrain.training.step import update

CHANGES = {
    "method.min_count": 5,
    "method.buffer_size": 7,
    "method.updates_per_rollout": 2,
    "training.checkpoint_every": 1,
    "evaluation.every": 0,
}


def ddpo(out, steps=4, **given):
    return toy_trainer(toy_config("ddpo", {**CHANGES, "training.max_steps": steps}), out, **given)


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters.values()])


rollouts = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-5, 5)), max_size=6), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(rollouts=rollouts, size=st.integers(2, 5))
def test_the_last_rewards_of_every_prompt(rollouts, size):
    """Also if every rollout is observed twice, as after a stop in the middle of a step."""
    statistics, twice = RunningStatistics(size), RunningStatistics(size)
    expected = {prompt: deque(maxlen=size) for prompt in "abc"}
    for step, rewards in enumerate(rollouts, 1):
        statistics.observe(step, rewards)
        twice.observe(step, [("a", 100.0)])
        restored = RunningStatistics(size)
        restored.load_state_dict(twice.state_dict())
        twice = restored
        twice.observe(step, rewards)
        for prompt, reward in rewards:
            expected[prompt].append(reward)
        for prompt in "abc":
            assert statistics.of(prompt) == twice.of(prompt) == list(expected[prompt])
    assert twice.state_dict() == statistics.state_dict()


def test_advantages_over_several_rollouts(tmp_path):
    """The rule of the published code, over six steps of prompts that come back."""
    trainer = ddpo(tmp_path)
    method, buffers, own = trainer.method, {}, 0
    for step in range(1, 7):
        batch = trainer.collector.collect(step)
        total = sum(w * batch.scores[name].values for name, w in WEIGHTS.items()).double().numpy()
        texts = np.array([batch.prompts[p].text for p in batch.tree.prompt[batch.tree.leaves]])
        expected = {}
        for text in np.unique(texts):
            rewards = total[texts == text]
            buffer = buffers.setdefault(text, deque(maxlen=method.buffer_size))
            buffer.extend(rewards)
            known = list(buffer) if len(buffer) >= method.min_count else total
            own += len(buffer) >= method.min_count
            expected[text] = (rewards - np.mean(known)) / (np.std(known) + 1e-6)
        advantage = np.concatenate([expected[prompt.text] for prompt in batch.prompts])
        steps = len(batch.advantage) // len(advantage)
        np.testing.assert_allclose(
            batch.advantage.reshape(-1, steps), advantage[:, None].repeat(steps, 1), atol=1e-4
        )
    assert 0 < own < 6 * P


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    whole, first = ddpo(tmp_path / "whole"), ddpo(tmp_path / "run", steps=2)
    whole.train()
    first.train()
    resumed = ddpo(tmp_path / "run")
    resumed.resume()
    assert resumed.method.state_dict() == first.method.state_dict()
    resumed.train()
    assert resumed.method.state_dict() == whole.method.state_dict()
    assert torch.equal(parameters(resumed), parameters(whole))


def test_a_stopped_step_is_not_counted_twice(tmp_path):
    """A checkpoint that is written between a rollout and its update."""
    whole, run = ddpo(tmp_path / "whole"), ddpo(tmp_path / "run")
    whole.train()
    run.step(1)
    run.collector.collect(2)
    run.save(None)
    resumed = ddpo(tmp_path / "run")
    assert resumed.restore() == []
    assert resumed.steps_done == 1
    for step in (2, 3, 4):
        batch = resumed.collector.collect(step)
        update(
            resumed.config,
            resumed.method,
            resumed.policy,
            resumed.optimizer,
            batch,
            resumed.sigmas,
        )
    assert resumed.method.state_dict() == whole.method.state_dict()
    assert torch.equal(parameters(resumed), parameters(whole))


def test_a_missing_score_is_not_stored(tmp_path):
    def failing(images, prompts):
        values = images.mean((1, 2, 3))
        values[0] = math.nan
        return values

    config = toy_config(
        "ddpo", {"rewards": [{"name": "failing"}], "training.max_failed_rewards": 1.0}
    )
    trainer = toy_trainer(config, tmp_path, rewards={"failing": failing})
    batch = trainer.collector.collect(1)
    latest = trainer.method.state_dict()["statistics"]["latest"]
    assert sum(map(len, latest.values())) == len(batch.tree.leaves) - 1
    assert batch.advantage.isfinite().all()
    assert (batch.advantage == 0).sum() == config.sampling.num_steps - 1


@pytest.mark.parametrize("estimator", ["score", "ppo"])
def test_the_first_update_of_both_estimators_is_the_same(tmp_path, estimator):
    changes = {"method.estimator": estimator, "method.updates_per_rollout": 1}
    trainer = toy_trainer(toy_config("ddpo", changes), tmp_path)
    metrics = trainer.step(1)
    other = {"method.estimator": "ppo", "method.updates_per_rollout": 1}
    expected = toy_trainer(toy_config("ddpo", other), tmp_path / "other")
    assert metrics["grad_norm"] == pytest.approx(expected.step(1)["grad_norm"], rel=1e-5)
    torch.testing.assert_close(parameters(trainer), parameters(expected), atol=1e-5, rtol=1e-5)
