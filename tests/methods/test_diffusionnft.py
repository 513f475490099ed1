"""DiffusionNFT against a naive version: images, advantages, gradient and the old policy."""

import numpy as np
import torch
from naive import Naive
from toy import PROMPTS
from toy_trainer import (
    REWARDS,
    SEED,
    STEP,
    WEIGHTS,
    P,
    compare_gradients,
    toy_config,
    toy_trainer,
)

from flowgrain.data import Prompt, latent_noise
from flowgrain.training.step import update

BETA = 0.7


def moved_trainer(out):
    """A trainer whose trained policy is no longer the old policy."""
    changes = {"method.kl_weight": 0.0, "method.tail_order": 1, "method.beta": BETA}
    trainer = toy_trainer(toy_config("diffusionnft", changes), out)
    with torch.no_grad():
        for p in trainer.policy.model.parameters():
            p += 0.05 * torch.sin(torch.arange(p.numel()).reshape(p.shape))
    return trainer


def naive_samples(naive: Naive) -> list[tuple[int, torch.Tensor]]:
    """Prompt number and latent of every image, by the ODE."""
    samples = []
    for prompt in range(P):
        naive.begin(prompt)
        for _ in range(naive.group_size):
            samples.append((prompt, naive.ode(naive.noise(), range(naive.num_steps + 1))))
    return samples


def naive_advantages(trainer, naive: Naive, samples) -> np.ndarray:
    """The weighted rewards, minus the mean of the prompt, divided by the std of the batch."""
    values = []
    for prompt, x in samples:
        image, prompts = trainer.backbone.decode(x[None]), [Prompt(naive.texts[prompt])]
        values.append(sum(w * float(REWARDS[n](image, prompts)[0]) for n, w in WEIGHTS.items()))
    values = np.array(values).reshape(P, -1)
    return ((values - values.mean(1, keepdims=True)) / (values.std() + 1e-4)).ravel()


def naive_losses(trainer, naive: Naive, samples, advantage) -> list[torch.Tensor]:
    """The loss of every image at every noise level that is drawn for it."""
    num_steps, policy = naive.num_steps, trainer.policy
    count = int(num_steps * naive.method.timestep_fraction)
    indices = np.tile(np.arange(num_steps), (len(samples), 1))
    levels = np.random.default_rng([SEED, STEP]).permuted(indices, axis=1)[:, :count]
    losses = []
    for i, (prompt, x0) in enumerate(samples):
        r = min(max(advantage[i] / 5 / 2 + 0.5, 0), 1)
        number = torch.tensor([PROMPTS.index(naive.texts[prompt])])
        for k in levels[i].tolist():
            t, eps = naive.sigma[k], latent_noise((2, 3), "forward", SEED, STEP, i, k)
            x = (1 - t) * x0 + t * eps
            v = policy.model(x[None], torch.tensor([t]), number)[0]
            with torch.no_grad():
                old = policy.old(x[None], torch.tensor([t]), number)[0]
            plus, minus = BETA * v + (1 - BETA) * old, (1 + BETA) * old - BETA * v
            errors = [x - t * velocity - x0 for velocity in (plus, minus)]
            plus, minus = ((e**2).mean() / e.detach().abs().mean() for e in errors)
            losses.append(5 / BETA * (r * plus + (1 - r) * minus))
    return losses


def test_the_old_policy_moves_once_per_rollout_by_the_number_of_updates(tmp_path, monkeypatch):
    changes = {"method.updates_per_rollout": 2, "method.decay_rate": 0.1}
    trainer = toy_trainer(toy_config("diffusionnft", changes), tmp_path)
    kept = []
    monkeypatch.setattr(trainer.policy, "move_old", kept.append)
    trainer.step(1)
    trainer.step(2)
    assert kept == [0.2, 0.4]


def test_diffusionnft_against_the_naive_version(tmp_path, monkeypatch):
    trainer = moved_trainer(tmp_path)
    naive = Naive(trainer)
    naive.model = trainer.policy.old
    samples = naive_samples(naive)
    batch = trainer.collector.collect(STEP)
    latents = torch.stack([x for _, x in samples])
    torch.testing.assert_close(batch.rollout.at(batch.credited), latents, atol=1e-5, rtol=1e-5)
    advantage = naive_advantages(trainer, naive, samples)
    np.testing.assert_allclose(batch.advantage.numpy(), advantage, atol=2e-3)

    losses = naive_losses(trainer, naive, samples, advantage)
    distances = compare_gradients(trainer, monkeypatch, lambda number: sum(losses) / len(losses))
    old = [p.clone() for p in trainer.policy.old.parameters()]
    metrics = update(
        trainer.config, trainer.method, trainer.policy, trainer.optimizer, batch, trainer.sigmas
    )
    assert len(distances) == 1
    assert distances[0] < 2e-3
    assert metrics["train_forward_passes"] == len(losses)

    keep = min(0.001 * STEP, 0.5)  # the share of itself that the old policy keeps
    pairs = zip(trainer.policy.old.parameters(), trainer.policy.model.parameters(), strict=True)
    for before, (moved, trained) in zip(old, pairs, strict=True):
        torch.testing.assert_close(moved, keep * before + (1 - keep) * trained)
