"""Adaptive groups: which prompts are replaced, and that groups are whole."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import PROMPTS, red
from toy_trainer import toy_config, toy_trainer

from flowgrain import SettingsError
from flowgrain.data import Prompt
from flowgrain.planning.plan import RunPlan, prompt_cost
from flowgrain.rewards import Scores
from flowgrain.training.adaptive import Spread, padded, replacements

ADAPTIVE = {"training.adaptive_groups.probe": 2, "method.group_size": 5, "rewards": ["mine"]}


def adaptive(tmp_path, reward, changes=None, method="flow_grpo"):
    config = toy_config(method, {**ADAPTIVE, **(changes or {})})
    return toy_trainer(config, tmp_path, rewards={"mine": reward})


def flat_for(*texts):
    """`red`, which is 1 for all images of some prompts."""

    def reward(images, prompts):
        same = torch.tensor([prompt.text in texts for prompt in prompts])
        return torch.where(same, 1.0, red(images, prompts))

    return reward


@pytest.mark.parametrize("method", ["flow_grpo", "diffusionnft", "densegrpo"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_with_spread_nothing_changes(tmp_path, method, chunk):
    """The whole groups are those of the plain run, up to the rounding of other batches."""
    options = {"sampling.prompts_per_chunk": chunk}
    if method == "densegrpo":
        options |= {"method.psi": [0.5] * 5}
    found = adaptive(tmp_path / "a", red, options, method)
    batch = found.collector.collect(1)
    options |= {"training.adaptive_groups.probe": 0}
    plain = adaptive(tmp_path / "b", red, options, method).collector.collect(1)
    assert batch.prompts == plain.prompts
    assert batch.rollout.tree == plain.rollout.tree
    assert batch.rollout.forward_passes == plain.rollout.forward_passes
    torch.testing.assert_close(batch.images, plain.images, atol=1e-6, rtol=0)
    torch.testing.assert_close(batch.advantage, plain.advantage, atol=1e-3, rtol=0)
    for rows in (plain.tree.edges, plain.tree.trained_parents, plain.tree.leaves):
        assert len(batch.rollout.at(rows)) == len(rows)
        expected = plain.rollout.at(rows)
        torch.testing.assert_close(batch.rollout.at(rows), expected, atol=1e-6, rtol=0)
    assert set(batch.monitors) == set(plain.monitors)
    for name, values in plain.monitors.items():
        torch.testing.assert_close(batch.monitors[name], values, atol=1e-4, rtol=1e-4)
    assert batch.metrics == {
        "adaptive/replaced_prompts": 0,
        "adaptive/groups_without_spread": 0,
        "adaptive/wasted_forward_passes": 0,
    }


def test_prompts_without_spread_are_replaced(tmp_path):
    """Two of four prompts are flat. A replaced group is that of its new prompt from the start."""
    for step in range(1, 5):
        reward = flat_for("zero", "one")
        plain = adaptive(tmp_path, reward, {"training.adaptive_groups.probe": 0}).collector.collect(
            step
        )
        trainer = adaptive(tmp_path, reward)
        batch = trainer.collector.collect(step)
        flat = [prompt.text in ("zero", "one") for prompt in plain.prompts]
        assert all(prompt.text in ("two", "three") for prompt in batch.prompts)
        assert batch.metrics["adaptive/groups_without_spread"] == 0
        replaced = batch.metrics["adaptive/replaced_prompts"]
        assert (replaced > 0) == any(flat)
        for place, was_flat in enumerate(flat):
            if not was_flat:
                assert batch.prompts[place] == plain.prompts[place]
        # The scores are those of the images and the final prompts.
        owners = [batch.prompts[p] for p in batch.tree.prompt[batch.tree.leaves]]
        assert torch.equal(batch.scores["mine"].values, reward(batch.images, owners))
        images = batch.images.reshape(2, 5, -1)
        if batch.prompts[0].text != plain.prompts[0].text:
            moved = images[0] - plain.images.reshape(2, 5, -1)[0]
            assert float(moved.abs().min(0).values.max()) > 1e-4
        again = trainer.collector.collect(step)
        assert torch.equal(again.images, batch.images)
        assert again.prompts == batch.prompts


def test_what_a_step_counts(tmp_path):
    """All prompts are flat: every place tries all of its prompts, and keeps the last."""
    trainer = adaptive(tmp_path, flat_for(*PROMPTS), {"training.adaptive_groups.max_rounds": 2})
    metrics = trainer.step(1)
    config = trainer.config
    cost, numbers = prompt_cost(config), RunPlan(config).to_dict()
    assert metrics["adaptive/replaced_prompts"] == 4
    assert metrics["adaptive/groups_without_spread"] == 2
    assert metrics["adaptive/wasted_forward_passes"] == 2 * numbers["largest_wasted_forward_passes"]
    assert (
        metrics["adaptive/wasted_forward_passes"] == 2 * 2 * 2 * 5
    )  # places, rounds, probe, steps
    assert metrics["forward_passes"] == 2 * cost.forward_passes + 40
    assert metrics["decodes"] == 2 * cost.decodes + 2 * 2 * 2
    assert metrics["advantage/zero"] == 1


def test_a_small_spread_counts_as_none(tmp_path):
    changes = {"training.adaptive_groups.min_spread": 10.0}
    metrics = adaptive(tmp_path, red, changes).collector.collect(1).metrics
    assert metrics["adaptive/replaced_prompts"] == 6  # two places, three rounds by default
    assert metrics["adaptive/groups_without_spread"] == 2


def test_failed_rewards_are_no_missing_spread(tmp_path):
    def broken(images, prompts):
        return torch.full((len(images),), torch.nan)

    batch = adaptive(tmp_path, broken).collector.collect(1)
    assert batch.metrics["adaptive/replaced_prompts"] == 0
    assert batch.scores["mine"].failed == 10


def scores(*rows):
    values = torch.tensor(rows).flatten()
    return Scores(values, 0, None)


def test_the_spread_of_several_rewards():
    nan = float("nan")
    a = scores([1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [nan, nan], [nan, 1.0])
    b = scores([2.0, 2.0], [1.0, 0.0], [0.0, 0.2], [1.0, 1.0], [nan, 3.0])
    weights = {"a": 1.0, "b": 1.0}
    found = Spread(weights, "reward", 0.0).missing({"a": a, "b": b}, 5)
    assert found == [True, True, False, False, False]
    found = Spread(weights, "advantage", 0.0).missing({"a": a, "b": b}, 5)
    assert found == [True, False, False, True, False]
    found = Spread({"a": 1.0, "b": 0.5}, "advantage", 0.06).missing({"a": a, "b": b}, 5)
    assert found == [True, False, True, True, False]


@given(base=st.floats(-1e3, 1e3), count=st.integers(2, 9))
def test_equal_scores_have_no_spread(base, count):
    values = torch.full((count,), base)
    rounded = torch.nextafter(values, torch.full_like(values, 2e3))
    values[0] = rounded[0] if abs(base) > 1e-30 else values[0]
    assert Spread({"a": 1.0}, "reward", 0.0).missing({"a": Scores(values, 0, None)}, 1) == [True]


@given(places=st.sets(st.integers(0, 30), min_size=1), ranks=st.integers(1, 5))
def test_every_rank_samples_its_own_places(places, ranks):
    places = sorted(places)
    order = padded(places, ranks)
    assert len(order) % ranks == 0
    assert set(order) == set(places)
    for rank in range(ranks):
        own = [p for p in places if p % ranks == rank]
        assert order[rank::ranks][: len(own)] == own
    most = max(len([p for p in places if p % ranks == rank]) for rank in range(ranks))
    assert len(order) == most * ranks


@given(count=st.integers(1, 12), used=st.integers(1, 12), step=st.integers(1, 9))
def test_prompts_to_try(count, used, step):
    prompts = [Prompt(str(number)) for number in range(count)]
    chosen = prompts[: min(used, count)]
    first = list(itertools.islice(replacements(prompts, chosen, step, 0), 2 * count))
    new = count - len(chosen)
    assert not {p.text for p in first[:new]} & {p.text for p in chosen}
    assert sorted(p.text for p in first[:count]) == sorted(p.text for p in prompts)
    again = list(itertools.islice(replacements(prompts, chosen, step, 0), 2 * count))
    assert first == again


def test_prompts_to_try_differ_between_steps_and_seeds():
    prompts = [Prompt(str(number)) for number in range(50)]
    orders = {
        tuple(p.text for p in itertools.islice(replacements(prompts, prompts[:2], step, seed), 8))
        for step in (1, 2)
        for seed in (0, 1)
    }
    assert len(orders) == 4


REFUSED = [
    ("g2rpo", {}, "do not start from independent noise"),
    ("flow_grpo", {"method.shared_noise": True}, "do not start from independent noise"),
    ("flow_grpo", {"training.adaptive_groups.probe": 1}, "Use 2 to 4"),
    ("flow_grpo", {"training.adaptive_groups.probe": 5}, "Use 2 to 4"),
    ("flow_grpo", {"method.group_size": 2}, "cannot be divided"),
    (
        "flow_grpo",
        {"training.adaptive_groups": {"probe": 0, "max_rounds": 2}},
        "max_rounds=2: has no effect",
    ),
    ("ddpo", {}, "earlier rewards of the prompt"),
    ("draft", {}, "does not compare images"),
    ("mend", {}, "does not compare images"),
]


@pytest.mark.parametrize(("method", "changes", "message"), REFUSED)
def test_refused(method, changes, message):
    base = ADAPTIVE
    if "training.adaptive_groups" in changes:
        base = {key: value for key, value in ADAPTIVE.items() if "adaptive" not in key}
    with pytest.raises(SettingsError, match=message):
        toy_config(method, {**base, "method.kl_weight": 0.0, **changes})


def test_a_reward_that_compares_images_is_refused(tmp_path):
    class Comparing:
        def score_group(self, images, prompt):
            return np.zeros(len(images))

    with pytest.raises(SettingsError, match="reward 'mine' compares the images of a whole group"):
        adaptive(tmp_path, Comparing())
