"""MEND: its gradient is that of a loop without the trainer's code. Caps, verdicts and state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_trainer import REWARDS, SEED, STEP, WEIGHTS, P, compare_gradients, toy_config, toy_trainer

from flowgrain import RunStopped, Trainer, load_config
from flowgrain.core import mend
from flowgrain.data import as_prompts, latent_noise
from flowgrain.methods import build_method, plan_tree
from flowgrain.rewards import differentiable
from flowgrain.training.step import rollout_loss, update

G, T = 5, 4
OPTIONS = {"sampling.num_steps": T, "method.group_size": G, "method.tail_order": 1}


def moved_trainer(out, changes=None, **given):
    """A trainer whose trained policy is neither the old policy nor the reference."""
    trainer = toy_trainer(toy_config("mend", {**OPTIONS, **(changes or {})}), out, **given)
    with torch.no_grad():
        for p in trainer.policy.model.parameters():
            p += 0.05 * torch.sin(torch.arange(p.numel()).reshape(p.shape))
    trainer.policy.refresh()
    return trainer


class Loop:
    """A round of MEND, written without the package's sampler, trees, losses and core/mend.py."""

    def __init__(self, trainer, tau):
        self.trainer, self.policy = trainer, trainer.policy
        self.sigma = trainer.sigmas.tolist()
        self.state = min(range(T), key=lambda k: abs(self.sigma[k] - 0.278))
        texts = [prompt.text for prompt in trainer.collector.collect(STEP).prompts]
        self.images = [self.image(p, i, text) for p, text in enumerate(texts) for i in range(G)]
        rewards = np.array([image["reward"] for image in self.images])
        overall = np.quantile(rewards, 0.5)
        self.failing = 0
        for number, image in enumerate(self.images):
            of_group = rewards[number // G * G :][:G]
            cap = max(np.quantile(of_group, 0.75), overall)
            image["move"] = self.move(image, cap, tau)

    def v(self, velocity, x, k, text):
        return velocity(x[None], torch.tensor([self.sigma[k]]), self.policy.encode([text]), 1.0)[0]

    def reward(self, x0, text):
        image = self.trainer.backbone.decode(x0[None])
        return sum(w * REWARDS[n](image, as_prompts([text]))[0] for n, w in WEIGHTS.items())

    def image(self, p, i, text):
        x = latent_noise((2, 3), "train", SEED, STEP, p, i)
        for k in range(T):
            if k == self.state:
                z = x
            x = x + (self.sigma[k + 1] - self.sigma[k]) * self.v(
                self.policy.old_velocity, x, k, text
            )
        x0 = x.clone().requires_grad_()
        reward = self.reward(x0, text)
        (slope,) = torch.autograd.grad(reward, x0)
        return {"z": z, "x0": x, "text": text, "reward": float(reward.detach()), "slope": slope}

    def move(self, image, cap, tau):
        if image["reward"] >= cap:
            return None
        self.failing += 1
        best, chosen = image["reward"], None
        for eta in (0.1, 0.2, 0.4):
            d = eta * image["slope"] / image["slope"].square().mean().sqrt()
            reward = float(self.reward(image["x0"] + d, image["text"]))
            j = min(reward, cap) - float(d.square().mean()) / (2 * tau)
            if j > best:
                best, chosen = j, d
        return chosen

    def loss(self, numbers, kl_weight):
        """Loss of an update with the images `numbers`, in one graph."""
        moved = [self.images[n]["move"] is not None for n in numbers]
        total = torch.zeros(())
        for number, is_moved in zip(numbers, moved, strict=True):
            image, k = self.images[number], self.state
            v, old, reference = (
                self.v(velocity, image["z"], k, image["text"])
                for velocity in (
                    self.policy.train_velocity,
                    self.policy.old_velocity,
                    self.policy.reference_velocity,
                )
            )
            target = image["z"] - self.sigma[k] * old + (image["move"] if is_moved else 0)
            error = (image["z"] - self.sigma[k] * v - target).square().mean()
            weight = 1 / sum(moved) if is_moved else 10 / (len(moved) - sum(moved))
            total = total + weight * error
            total = total + kl_weight * (v - reference).square().mean() / len(numbers)
        return total


@pytest.mark.parametrize(
    ("size", "decoded", "updates"), [(1, 1, 1), (3, 2, 1), (1000, 100, 1), (2, 3, 2)]
)
def test_the_gradient_is_that_of_a_loop_at_any_batch_size(
    tmp_path, monkeypatch, size, decoded, updates
):
    changes = {
        "training.micro_batch_size": size,
        "sampling.batch_size": size,
        "method.decode_batch_size": decoded,
        "method.updates_per_rollout": updates,
        "method.tau": 0.1,
    }
    trainer = moved_trainer(tmp_path, changes)
    loop = Loop(trainer, 0.1)
    repaired = sum(image["move"] is not None for image in loop.images)
    assert 0 < repaired < loop.failing < P * G
    parts = [np.array_split(np.arange(G), updates)[u] for u in range(updates)]
    numbers = [[p * G + int(i) for p in range(P) for i in part] for part in parts]
    batch = trainer.collector.collect(STEP)
    distances = compare_gradients(trainer, monkeypatch, lambda u: loop.loss(numbers[u], 0.2))
    metrics = update(
        trainer.config, trainer.method, trainer.policy, trainer.optimizer, batch, trainer.sigmas
    )
    assert len(distances) == updates
    assert max(distances) < 2e-4
    assert (metrics["repair/failing"], metrics["repair/repaired"]) == (loop.failing, repaired)
    assert metrics["candidate_decodes"] == 3 * loop.failing


def test_the_first_loss_of_kept_images_is_zero(tmp_path):
    """The trained policy is the old policy. Moves that cost too much are not accepted."""
    changes = {**OPTIONS, "method.tau": 1e-3, "method.kl_weight": 0.0}
    trainer = toy_trainer(toy_config("mend", changes), tmp_path)
    metrics = trainer.step(1)
    assert metrics["repair/repaired"] == 0
    assert metrics["loss"] == 0
    assert trainer.method.state_dict()["tau"] == 1.5e-3


@pytest.mark.parametrize(
    ("lora", "rate"), [pytest.param(0, 1e-4, marks=pytest.mark.slow), (8, 1e-3)]
)
def test_training_increases_the_reward(tmp_path, lora, rate):
    values = {
        "sampling.num_steps": 4,
        "sampling.guidance_scale": 1.0,
        "method.group_size": 4,
        "method.decode_batch_size": 16,
        "rewards": ["towers"],
        "training.prompts_per_step": 8,
        "training.micro_batch_size": 32,
        "evaluation.rewards": [],
        "evaluation.every": 0,
        "lora.rank": lora,
        "optimizer.learning_rate": rate,
    }
    trainer = Trainer(load_config("mend", values), tmp_path)
    before = trainer.evaluate(num_steps=4, num_images=32).means()["towers"]
    for step in range(1, 9):
        assert trainer.step(step)["updates/skipped"] == 0
    assert trainer.evaluate(num_steps=4, num_images=32).means()["towers"] > before + 0.1


def test_an_image_without_a_score_has_no_loss(tmp_path):
    @differentiable
    def half(images, prompts):
        scores = images.mean((1, 2, 3))
        return torch.where(images[:, 0, 0, 0] > threshold, scores, torch.nan)

    changes = {"training.max_failed_rewards": 1.0, "rewards": ["towers"], "method.kl_weight": 0.0}
    threshold = -1.0
    trainer = moved_trainer(tmp_path, changes, rewards={"half": half})
    batch = trainer.collector.collect(STEP)
    threshold = float(batch.images[:, 0, 0, 0].median())
    losses = trainer_losses(trainer, batch)
    scored = batch.images[:, 0, 0, 0] > threshold
    assert torch.equal(~losses.reward.isnan(), scored)
    assert torch.equal(losses.weight > 0, scored)
    threshold = math.inf
    assert trainer.step(STEP)["loss"] == 0
    assert trainer.method.state_dict() == {"tau": None, "global_cap": None}


def trainer_losses(trainer, batch):
    losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    losses.prepare()
    return losses


def test_the_state_changes_after_the_updates(tmp_path):
    """A step that was stopped before its updates is repeated with the same state."""
    trainer = moved_trainer(tmp_path)
    batch = trainer.collector.collect(STEP)
    first, second = trainer_losses(trainer, batch), trainer_losses(trainer, batch)
    assert trainer.method.state_dict() == {"tau": None, "global_cap": None}
    assert first.found == second.found
    trainer.step(STEP)
    state = trainer.method.state_dict()
    assert state["global_cap"] == first.found["repair/global_cap"]
    fresh = build_method({"name": "mend"})
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state


def test_the_cost_of_a_move_is_that_of_the_current_tau():
    """The move has the cost .01 / (2 tau) and raises the reward by .1."""
    method = build_method({"name": "mend", "tau": 0.1})
    reward, candidates, cap = torch.zeros(1), torch.tensor([[0.1]]), torch.ones(1)
    moves = torch.full((1, 1, 4), 0.1)
    assert method.choose(reward, candidates, cap, moves).tolist() == [0]
    method.load_state_dict({"tau": 0.01, "global_cap": None})
    assert method.choose(reward, candidates, cap, moves).tolist() == [mend.KEPT]


def test_a_reward_that_breaks_its_promise_stops_the_run(tmp_path):
    detached = differentiable(lambda images, prompts: images.detach().mean((1, 2, 3)))
    trainer = moved_trainer(tmp_path, {"rewards": ["towers"]}, rewards={"mine": detached})
    with pytest.raises(RunStopped, match="declared as differentiable, but its scores have no gra"):
        trainer.step(1)


@pytest.mark.parametrize("order", [1, 2])
def test_the_state_near_the_published_level_is_kept(order):
    """Index 8 of the grid of the published code, whose levels end with .465, .278 and .0089."""
    method = build_method({"name": "mend", "group_size": 3, "tail_order": order})
    published = [*np.linspace(1, 0.5, 7), 0.465, 0.278, 0.0089, 0.0]
    tree = plan_tree(method, 10, sigmas=published)
    assert tree.grid_index[tree.kept].tolist() == [8] * 3
    assert len(tree.evaluated) == 30
    assert (tree.multistep.sum() > 0) == (order == 2)
    config = load_config("mend", {"method.group_size": 3})  # linear, then shifted by 3
    assert config.sigmas()[9] == pytest.approx(0.25)
    assert config.tree().grid_index[config.tree().kept].tolist() == [9] * 3


# ------------------------------------------------------------------------------ core functions

numbers = st.lists(st.floats(-3, 3), min_size=6, max_size=6)


@given(numbers, st.floats(-3, 3), st.floats(0, 1))
def test_the_global_cap_never_falls(values, previous, rate):
    cap = mend.next_global_cap(previous, torch.tensor(values), 0.5, rate)
    assert cap >= previous
    assert cap <= max(previous, max(values)) + 1e-6


@given(numbers, numbers, st.floats(0.01, 10))
def test_an_accepted_candidate_is_better_than_the_image(values, others, tau):
    reward, candidates = torch.tensor(values[:3]), torch.tensor([others[:3], others[3:]])
    cap = mend.group_cap(reward, torch.tensor([0, 0, 1]), 0.75)
    cost = torch.tensor([[0.1], [0.4]]).expand(2, 3) / (2 * tau)
    j = mend.capped_objective(reward, candidates, cap, cost)
    index = mend.verdict(j)
    for image, chosen in enumerate(index.tolist()):
        if chosen == mend.KEPT:
            assert (j[1:, image] <= j[0, image]).all()
        else:
            assert candidates[chosen, image] > reward[image]
            assert j[1 + chosen, image] == j[1:, image].max() > j[0, image]
    assert (index[reward >= cap] == mend.KEPT).all()


def test_ties_and_missing_scores_are_not_accepted():
    j = torch.tensor([[1.0, 1.0, 1.0, torch.nan], [1.0, torch.nan, 2.0, 3.0]])
    assert mend.verdict(j).tolist() == [mend.KEPT, mend.KEPT, 0, mend.KEPT]


def test_weights_sum_to_one_and_lambda():
    repaired = torch.tensor([True, False, True, False, False])
    kept = torch.tensor([False, True, False, True, False])
    weights = mend.loss_weights(repaired, kept, 10.0)
    assert weights.tolist() == [0.5, 5.0, 0.5, 5.0, 0.0]
    assert not mend.loss_weights(kept & False, kept & False, 10.0).any()


@given(st.floats(1e-3, 10), st.floats(0, 1))
def test_tau_stays_in_its_bounds(tau, acceptance):
    new = mend.next_tau(tau, acceptance, (0.3, 0.6), 1.5, (1e-3, 10.0))
    assert 1e-3 <= new <= 10
    assert (new >= tau) or acceptance > 0.6
    assert (new <= tau) or acceptance < 0.3


def test_candidates_have_their_length():
    slope = torch.randn(3, 4, 2, generator=torch.manual_seed(0))
    moves = mend.proposals(slope, (0.1, 0.4))
    rms = moves.flatten(2).square().mean(2).sqrt()
    torch.testing.assert_close(rms, torch.tensor([[0.1], [0.4]]).expand(2, 3))
    assert not mend.proposals(torch.zeros(1, 4, 2), (0.1,)).any()
