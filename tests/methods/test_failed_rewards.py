"""Rewards that fail: without a score, without a gradient, in a later update, above a cap."""

import logging
from dataclasses import replace

import pytest
import torch
from toy import red
from toy_trainer import STEP, P, compare_gradients, toy_config, toy_trainer

from flowgrain import RunStopped
from flowgrain.core.regression import Quantities, crd_loss, dgpo_loss, group_softmax, linearized
from flowgrain.data import as_prompts, latent_noise
from flowgrain.methods import METHODS, ForwardProcess, Repair
from flowgrain.rewards import differentiable
from flowgrain.training import forward_process
from flowgrain.training.step import rollout_loss

FORWARD = [
    name
    for name in METHODS
    if issubclass(METHODS.get(name), ForwardProcess) and not issubclass(METHODS.get(name), Repair)
]
ONE = {"rewards": [{"name": "red", "weight": 1.0}], "method.kl_weight": 0.0}


def moved(trainer):
    """Move the trained policy away from the old policy and the reference."""
    with torch.no_grad():
        for p in trainer.policy.model.parameters():
            p += 0.05 * torch.sin(torch.arange(p.numel()).reshape(p.shape))
    trainer.policy.refresh()
    return trainer


def make(method, out, reward, changes=None):
    values = {**ONE, "training.max_failed_rewards": 1.0, **(changes or {})}
    return moved(toy_trainer(toy_config(method, values), out, rewards={"red": reward}))


def gradient(trainer, batch):
    """The loss of the first update and its gradient, as one vector."""
    losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    losses.prepare()
    share = losses.updates[0]
    places = range(len(share.micro_batches))
    loss = torch.cat([losses.terms(0, place)["loss"] for place in places]).sum() / share.count
    parts = torch.autograd.grad(loss, list(trainer.policy.model.parameters()))
    return float(loss.detach()), torch.cat([part.flatten() for part in parts])


class Troubled:
    """The reward `red`, whose calls for a gradient can raise."""

    differentiable = True

    def __init__(self, fails=()):
        self.calls, self.fails = 0, fails

    def __call__(self, images, prompts):
        if images.requires_grad:
            self.calls += 1
            if self.calls in self.fails:
                raise OSError("gone")
        return red(images, prompts)


# ------------------------------------------------------------------------- without a score


@pytest.mark.parametrize("name", FORWARD)
def test_an_image_without_a_score_is_not_trained(name, tmp_path):
    """Its latent does not matter, and a rollout without scores has no gradient."""

    def some(images, prompts):
        scores = red(images, prompts)
        return torch.where(torch.arange(len(scores)) % 4 < failing, torch.nan, scores)

    changes = {"method.group_size": 4, "method.tail_order": 1, "method.updates_per_rollout": 1}
    if name == "awm":
        changes["method.ema_weight"] = 0.0  # does not depend on rewards
    failing = 1
    trainer = make(name, tmp_path, some, changes)
    batch = trainer.collector.collect(STEP)
    assert batch.known.tolist() == [False, True, True, True] * P
    loss, found = gradient(trainer, batch)
    assert found.norm() > 0
    latents = batch.rollout.at(batch.tree.leaves)
    changed = torch.where(batch.known[:, None, None], latents, latents + 1)
    rollout = replace_latents(batch, changed)
    again, same = gradient(trainer, replace(batch, rollout=rollout))
    assert again == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(same, found, rtol=1e-4, atol=1e-6)
    failing = 4
    loss, found = gradient(trainer, trainer.collector.collect(STEP))
    assert loss == 0 == found.abs().max()


def replace_latents(batch, x0):
    """The rollout of `batch` with other images."""

    class Changed:
        tree, forward_passes = batch.rollout.tree, batch.rollout.forward_passes

        def at(self, rows):
            number = {int(row): place for place, row in enumerate(batch.tree.leaves)}
            return x0[[number[int(row)] for row in rows]]

    return Changed()


def test_the_loss_of_a_group_leaves_out_images_without_a_score():
    torch.manual_seed(0)
    trained, old, reference = (torch.rand(5, 3) for _ in range(3))
    advantage, group = torch.randn(5), torch.tensor([0, 0, 0, 1, 1])
    known = torch.tensor([True, False, True, False, False])
    whole = Quantities(trained, old, reference, advantage, group, known)
    part = Quantities(trained[known], old[known], reference[known], advantage[known], group[known])
    for loss in (
        lambda q: dgpo_loss(q, 5.0, 0.01),
        lambda q: crd_loss(q, q.advantage.sigmoid(), 2.0, None, "mse"),
        lambda q: crd_loss(q, q.advantage.sigmoid(), 2.0, 0.3, "bce"),
    ):
        for ours, expected in zip(linearized(loss, whole), linearized(loss, part), strict=True):
            torch.testing.assert_close(ours[known], expected)
            assert (ours[~known] == 0).all()
    weight = group_softmax(advantage, group, known)
    torch.testing.assert_close(weight[known], advantage[known].softmax(0))
    assert (weight[~known] == 0).all()


def test_an_image_with_one_of_two_scores_is_trained_if_advantages_are_mixed(tmp_path):
    half = lambda images, prompts: torch.full((len(images),), torch.nan)  # noqa: E731
    for mix, known in (("advantage", True), ("reward", False)):
        changes = {"method.reward_mix": mix, "training.max_failed_rewards": 1.0}
        trainer = toy_trainer(
            toy_config("vgrpo", changes), tmp_path, rewards={"red": red, "green": half}
        )
        assert set(trainer.collector.collect(STEP).known.tolist()) == {known}


# ------------------------------------------------------------------------ without a gradient


@pytest.mark.parametrize("name", ["draft", "refl"])
def test_the_gradient_of_every_update_is_that_of_a_loop(name, tmp_path, monkeypatch):
    changes = {"method.group_size": 4, "method.updates_per_rollout": 2}
    trainer = make(name, tmp_path, differentiable(red), changes)
    batch, policy = trainer.collector.collect(STEP), trainer.policy
    tree = batch.rollout.tree
    share = [[0, 1, 4, 5], [2, 3, 6, 7]]

    def naive(number):
        loss = torch.zeros(())
        for leaf in tree.leaves[share[number]]:
            start = tree.parent[leaf : leaf + 1]
            x, text = batch.rollout.at(start), batch.prompts_of(start)[0].text
            sigma = trainer.sigmas[torch.from_numpy(tree.grid_index[start])]
            v = policy.train_velocity(x, sigma, policy.encode([text]), 1.0)
            image = trainer.backbone.decode(x - sigma * v)
            loss = loss + trainer.method.loss(red(image, as_prompts([text])))[0]
        return loss / 4

    distances = compare_gradients(trainer, monkeypatch, naive)
    monkeypatch.setattr(trainer.collector, "collect", lambda step: batch)
    assert trainer.step(STEP)["updates"] == len(distances) == 2
    assert max(distances) < 1e-4


@pytest.mark.parametrize("name", ["draft", "refl", "mend"])
def test_a_failed_call_masks_its_images_or_stops_the_run(name, tmp_path):
    """Before anything has changed, by the share that may fail."""
    reward = Troubled()
    changes = {"method.group_size": 4}
    trainer = make(name, tmp_path, reward, changes)
    batch = trainer.collector.collect(STEP)
    whole = gradient(trainer, batch)
    reward.calls, reward.fails = 0, (3,)
    some = gradient(trainer, batch)
    assert whole[0] != some[0]
    reward.calls = 0
    assert trainer.step(STEP)["failed/gradient"] == 1
    reward.calls = 0
    trainer = make(
        name, tmp_path / "stopped", reward, {**changes, **{"training.max_failed_rewards": 0.1}}
    )
    before = {n: p.clone() for n, p in trainer.policy.parameters.items()}
    with pytest.raises(RunStopped, match=r"for 1 of 8 images \(OSError: gone"):
        trainer.step(STEP)
    assert all(torch.equal(before[n], p) for n, p in trainer.policy.parameters.items())
    assert all(p.grad is None for p in trainer.policy.parameters.values())


@pytest.mark.parametrize("name", ["draft", "refl"])
def test_a_failure_in_a_later_update_never_saves_a_part_of_a_step(name, tmp_path):
    reward = Troubled(fails=range(5, 9))
    changes = {"method.group_size": 4, "method.updates_per_rollout": 2}
    trainer = make(name, tmp_path, reward, {**changes, "training.max_failed_rewards": 0.0})
    metrics = trainer.step(STEP)
    assert (metrics["failed/gradient"], metrics["updates"], trainer.policy.updates) == (4, 2, 2)


def test_failed_candidates_are_reported_and_do_not_change_tau(tmp_path):
    @differentiable
    def reward(images, prompts):
        if not images.requires_grad and candidates:
            raise OSError("gone")
        return red(images, prompts)

    candidates = False
    for allowed in (1.0, 0.2):
        changes = {"method.group_size": 4, "training.max_failed_rewards": allowed}
        trainer = make("mend", tmp_path / str(allowed), reward, changes)
        candidates = False
        batch = trainer.collector.collect(STEP)
        candidates = True
        losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
        if allowed < 1:
            with pytest.raises(RunStopped, match=r"reward 'red' failed on .*OSError: gone"):
                losses.prepare()
            continue
        losses.prepare()
        losses.finish()
        assert losses.found["failed/candidates"] == losses.found["candidate_decodes"] > 0
        assert losses.found["repair/failing"] == 0
        assert trainer.method.state_dict()["tau"] is None


def test_refl_warns_if_every_image_is_above_the_cap(tmp_path, caplog):
    for cap, warned in ((-10.0, True), (10.0, False)):
        trainer = make("refl", tmp_path, differentiable(red), {"method.reward_cap": cap})
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert trainer.step(STEP)["clip_fraction"] == warned
        assert ("step 1 trained no image" in caplog.text) == warned


# --------------------------------------------------------------------- nothing computed twice


def test_dgpo_evaluates_the_reference_and_the_noise_of_a_group_once(tmp_path, monkeypatch):
    changes = {"method.kl_weight": 0.2, "training.micro_batch_size": 1000}
    trainer = make("dgpo", tmp_path, red, changes)
    rows, keys = [], []
    evaluate = trainer.policy.reference_velocity

    def counted(x, *inputs):
        rows.append(len(x))
        return evaluate(x, *inputs)

    def noise(*key):
        keys.append(key)
        return latent_noise(*key)

    monkeypatch.setattr(trainer.policy, "reference_velocity", counted)
    monkeypatch.setattr(forward_process, "latent_noise", noise)
    metrics = trainer.step(STEP)
    assert sum(rows) == metrics["train_forward_passes"]
    assert metrics["frozen_forward_passes"] == 3 * sum(rows)
    assert len(keys) == 2 * len(set(keys))  # once in each pass
