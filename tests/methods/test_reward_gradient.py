"""ReFL and DRaFT: their gradient is that of a sampler loop that autograd differentiates."""

import math

import numpy as np
import pytest
import torch
import twins

from flowgrain import RunStopped, SettingsError, Trainer, load_config
from flowgrain.config import Config
from flowgrain.core.sde import sigma_grid
from flowgrain.data import as_prompts, latent_noise
from flowgrain.methods import plan_tree, price
from flowgrain.rewards import DIFFERENTIABLE, REWARDS, differentiable, is_differentiable
from flowgrain.training.step import rollout_loss

P, G, T, SEED, STEP, GUIDANCE = 2, 2, 4, 5, 1, 1.5
WEIGHTS = {"towers": 1.0, "preference": 0.1}
SETTINGS = {
    "sampling.num_steps": T,
    "sampling.guidance_scale": GUIDANCE,
    "method.group_size": G,
    "rewards": [{"name": name, "weight": weight} for name, weight in WEIGHTS.items()],
    "training.prompts_per_step": P,
    "training.micro_batch_size": 3,
    "evaluation.rewards": [],
    "evaluation.num_prompts": 16,
    "evaluation.every": 0,
    "runtime.seed": SEED,
}

# As in the loop. In other batches the last bits differ, which several steps make larger.
ONE_BY_ONE = {"sampling.batch_size": 1, "training.micro_batch_size": 1}


def config_of(method, changes=None) -> Config:
    return load_config(method, {**SETTINGS, **(changes or {})})


def gradient_of(trainer, batch=None) -> torch.Tensor:
    """The gradient of the loss of a rollout batch, as one vector."""
    parameters = list(trainer.policy.parameters.values())
    for parameter in parameters:
        parameter.grad = None
    batch = batch or trainer.collector.collect(STEP)
    losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    (share,) = losses.updates
    for place, micro_batch in enumerate(share.micro_batches):
        assert micro_batch.counts
        (losses.terms(0, place)["loss"].sum() / share.count).backward()
    return torch.cat([p.grad.flatten() for p in parameters])


class Loop:
    """A sampler loop with gradient, written without the package's sampler, tree and losses."""

    def __init__(self, trainer) -> None:
        self.trainer, self.backbone, self.model = trainer, trainer.backbone, trainer.policy.model
        self.sigma = sigma_grid(T).tolist()
        self.texts = [prompt.text for prompt in trainer.collector.collect(STEP).prompts]

    def v(self, x, k, text):
        """Velocity with classifier-free guidance."""
        cond = self.backbone.encode([text, ""])
        sigma = torch.full((2,), self.sigma[k])
        v, free = self.backbone.velocity(self.model, torch.stack([x, x]), sigma, cond)
        return free + GUIDANCE * (v - free)

    def noise(self, p, draw):
        return latent_noise((4, 8, 8), "train", SEED, STEP, p, draw)

    def sampled(self, x, steps, text):
        for k in steps:
            x = x + (self.sigma[k + 1] - self.sigma[k]) * self.v(x, k, text)
        return x

    def reward(self, x0, text):
        image = self.backbone.decode(x0[None])
        rewards = self.trainer.rewards
        return sum(WEIGHTS[name] * rewards[name](image, as_prompts([text]))[0] for name in WEIGHTS)

    def gradient(self, losses) -> torch.Tensor:
        parameters = list(self.trainer.policy.parameters.values())
        parts = torch.autograd.grad(sum(losses) / len(losses), parameters)
        return torch.cat([part.flatten() for part in parts])


def assert_same(ours, expected, tolerance=1e-5):
    assert expected.norm() > 0
    assert float((ours - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("last_steps", [1, 2, T])
def test_draft_against_a_loop(tmp_path, last_steps):
    changes = {"method.last_steps": last_steps, **ONE_BY_ONE}
    trainer = Trainer(config_of("draft", changes), tmp_path)
    loop, losses = Loop(trainer), []
    for p, text in enumerate(loop.texts):
        for i in range(G):
            with torch.no_grad():
                x = loop.sampled(loop.noise(p, i), range(T - last_steps), text)
            x0 = loop.sampled(x, range(T - last_steps, T), text)
            losses.append(-loop.reward(x0, text))
    assert_same(gradient_of(trainer), loop.gradient(losses))


def test_draft_lv_against_a_loop(tmp_path):
    samples = 3
    trainer = Trainer(config_of("draft", {"method.lv_samples": samples}), tmp_path)
    loop, losses = Loop(trainer), []
    for p, text in enumerate(loop.texts):
        for i in range(G):
            with torch.no_grad():
                x0 = loop.sampled(loop.noise(p, i), range(T), text)
            for j in range(samples):
                eps = latent_noise((4, 8, 8), "renoise", SEED, STEP, p * G + i, j)
                x = (1 - loop.sigma[T - 1]) * x0 + loop.sigma[T - 1] * eps
                losses.append(-loop.reward(loop.sampled(x, [T - 1], text), text))
    assert_same(gradient_of(trainer), loop.gradient(losses))


@pytest.mark.parametrize("cap", [0.0, None])
def test_refl_against_a_loop(tmp_path, cap):
    changes = {"method.first_step": 0.25, "method.reward_cap": cap, "method.loss_scale": 0.5}
    trainer = Trainer(config_of("refl", changes), tmp_path)
    loop, losses, late = Loop(trainer), [], []
    random = np.random.default_rng([SEED, STEP])
    steps = [int(random.integers(1, T)) for _ in range(G)]
    for p, text in enumerate(loop.texts):
        for i, k in enumerate(steps):
            with torch.no_grad():
                x = loop.sampled(loop.noise(p, i), range(k), text)
            x0_hat = x - loop.sigma[k] * loop.v(x, k, text)
            reward = loop.reward(x0_hat, text)
            losses.append(0.5 * (-reward if cap is None else torch.relu(cap - reward)))
            late.append(x0_hat.detach())
    batch = trainer.collector.collect(STEP)
    images = trainer.backbone.decode(torch.stack(late))
    torch.testing.assert_close(batch.images, images.detach(), atol=1e-5, rtol=0)
    assert_same(gradient_of(trainer, batch), loop.gradient(losses))


def test_the_gradient_does_not_depend_on_batch_sizes(tmp_path):
    changes = {"method.last_steps": 2}
    small = gradient_of(Trainer(config_of("draft", changes), tmp_path))
    large = {
        "method.decode_batch_size": 3,
        "training.micro_batch_size": 64,
        "sampling.batch_size": 5,
        "rewards": [
            {"name": name, "weight": weight, "batch_size": 2} for name, weight in WEIGHTS.items()
        ],
    }
    trainer = Trainer(config_of("draft", {**changes, **large}), tmp_path)
    assert_same(gradient_of(trainer), small, tolerance=1e-4)


def test_the_kl_has_a_gradient(tmp_path):
    """The reference is the policy before training. A step away from it, the KL pulls back."""
    config = config_of("draft", {"method.last_steps": 2, "method.kl_weight": 3.0})
    trainer = Trainer(config, tmp_path)
    with torch.no_grad():
        for parameter in trainer.policy.parameters.values():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.manual_seed(1))
    batch = trainer.collector.collect(STEP)
    both = gradient_of(trainer, batch)
    trainer.method = trainer.method.model_copy(update={"kl_weight": 0.0})
    plain = gradient_of(trainer, batch)
    parameters = list(trainer.policy.parameters.values())
    step = -1e-4 * (both - plain) / (both - plain).norm()

    def distance():
        losses = rollout_loss(config, config.method, trainer.policy, batch, trainer.sigmas)
        return sum(float(losses.terms(0, place)["kl"].detach().sum()) for place in range(2))

    before = distance()
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(parameters) + step, parameters
    )
    assert 0 < distance() < before


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param("draft", {"method.last_steps": 2}, marks=pytest.mark.slow),
        pytest.param("draft", {"method.lv_samples": 2}, marks=pytest.mark.slow),
        ("refl", {"optimizer.learning_rate": 3e-4}),
        pytest.param("draft", {"runtime.dtype": "bfloat16"}, marks=pytest.mark.slow),
        ("draft", {"lora.rank": 8, "optimizer.learning_rate": 3e-3, "method.last_steps": 2}),
    ],
)
def test_training_increases_the_reward(tmp_path, method, changes):
    values = {
        "rewards": ["towers"],
        "training.prompts_per_step": 8,
        "sampling.guidance_scale": 1.0,
        "training.micro_batch_size": 16,
        "method.decode_batch_size": 16,
    }
    trainer = Trainer(config_of(method, {**values, **changes}), tmp_path)
    before = trainer.evaluate(num_steps=T, num_images=32).means()["towers"]
    for step in range(1, 9):
        assert trainer.step(step)["updates/skipped"] == 0
    after = trainer.evaluate(num_steps=T, num_images=32).means()["towers"]
    assert after > before + 0.05


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    """On a twin of SD3, with a VAE that is recomputed block by block."""
    twins.sd3(tmp_path / "sd3", with_t5=False)
    found = []
    for recompute in (False, True):
        changes = {
            "model.name": "sd3",
            "model.path": str(tmp_path / "sd3"),
            "model.height": 16,
            "model.width": 16,
            "model.embedding_cache": None,
            "model.gradient_checkpointing": recompute,
            "runtime.dtype": "float32",
            "runtime.device": "cpu",
            "lora.rank": 0,
            "optimizer.learning_rate": 1e-4,
            "method.last_steps": 3,
        }
        trainer = Trainer(
            config_of("draft", changes),
            tmp_path / "run",
            rewards={"bright": differentiable(lambda images, prompts: images.mean((1, 2, 3)))},
            prompts=["a red cat", "two dogs"],
            eval_prompts=["a bird"],
        )
        assert trainer.backbone.vae.decoder.gradient_checkpointing == recompute
        found.append(gradient_of(trainer))
    assert_same(*found)


def test_the_differentiable_rewards_are_those_of_the_list():
    assert {name for name in REWARDS if is_differentiable(REWARDS.get(name))} == {*DIFFERENTIABLE}


@pytest.mark.parametrize("method", ["draft", "refl", "mend"])
def test_other_rewards_are_refused_before_anything_is_written(tmp_path, method):
    config = load_config(method, {"rewards": ["towers", "oracle"]})
    with pytest.raises(SettingsError) as error:
        Trainer(config, tmp_path / "run")
    message = str(error.value)
    assert message.startswith(f"rewards[oracle]: method '{method}' trains on the gradient")
    assert "Use clip, " in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingsError, match=r"rewards\[mine\]"):
        Trainer(config, tmp_path / "run", rewards={"mine": lambda images, prompts: images})


def test_a_missing_score_masks_its_image(tmp_path):
    """The loss is divided by all images."""

    @differentiable
    def half(images, prompts):
        scores = images.mean((1, 2, 3))
        return torch.where(images[:, 0].mean((1, 2)) > chosen, scores, torch.nan)

    changes = {"training.max_failed_rewards": 1.0, "method.decode_batch_size": 4}
    chosen = -1.0
    trainer = Trainer(config_of("draft", changes), tmp_path, rewards={"half": half})
    batch = trainer.collector.collect(STEP)
    every = gradient_of(trainer, batch)
    red = batch.images[:, 0].mean((1, 2))
    chosen = float(red.median())  # the lower of the two in the middle
    some = gradient_of(trainer, batch)
    chosen = math.inf
    assert gradient_of(trainer, batch).abs().max() == 0
    assert 0 < (some - every).norm() < every.norm()
    metrics = trainer.step(STEP)
    assert metrics["failed/half"] == P * G
    assert (metrics["clip_fraction"], metrics["failed/gradient"]) == (0, 0)


def test_a_reward_that_breaks_its_promise_stops_the_run(tmp_path):
    detached = differentiable(lambda images, prompts: images.detach().mean((1, 2, 3)))
    trainer = Trainer(config_of("draft"), tmp_path, rewards={"mine": detached})
    with pytest.raises(RunStopped, match="declared as differentiable, but its scores have no gra"):
        trainer.step(1)


def test_plans_keep_the_state_where_the_gradient_starts():
    draft = config_of("draft", {"method.last_steps": 3}).method
    tree = plan_tree(draft, T)
    assert tree.grid_index[tree.kept].tolist() == [T - 3] * G
    assert (tree.repeat(3).kept.sum(), len(tree.edges)) == (3 * G, 0)
    cost = price(draft, T)
    assert (cost.forward_passes, cost.train_forward_passes) == (G * T, 3 * G)
    refl = load_config("refl").method
    late = [plan_tree(refl, 40, step) for step in range(1, 200)]
    found = {int(tree.grid_index[tree.kept][0]) for tree in late}
    assert found == set(range(30, 40))  # published code: random.randint(30, 39)
    assert all(len(tree.evaluated) == tree.grid_index[tree.kept][0] + 1 for tree in late)
