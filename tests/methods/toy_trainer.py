"""A trainer of the toy backbone with two rewards, and a comparison of its gradients."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toy import PROMPTS, Toy, green, red

from flowgrain.config import Config, load_config
from flowgrain.training import Trainer

P, SEED, STEP = 2, 5, 1
"""Prompts per step, seed of the runs, and the training step that is compared."""

REWARDS = {"red": red, "green": green}
WEIGHTS = {"red": 1.0, "green": 0.5}


def toy_config(method: str, changes: Mapping[str, Any] | None = None) -> Config:
    """The paper's values of `method` on a short grid, with `changes` by full path."""
    values: dict[str, Any] = {
        "sampling.num_steps": 5,
        "method.group_size": 3,
        "method.kl_weight": 0.2,
        "rewards": [{"name": name, "weight": weight} for name, weight in WEIGHTS.items()],
        "optimizer.learning_rate": 1e-2,
        "training.prompts_per_step": P,
        "evaluation.rewards": [],
        "runtime.seed": SEED,
    }
    return load_config(method, {**values, **(changes or {})})


def toy_trainer(config: Config, out: Path, **given: Any) -> Trainer:
    """A trainer of `config` on the toy backbone."""
    known = {"rewards": REWARDS, "prompts": PROMPTS, "eval_prompts": PROMPTS, "backbone": Toy()}
    return Trainer(config, out, **{**known, **given})


def compare_gradients(
    trainer: Trainer, monkeypatch: Any, naive_loss: Callable[[int], Tensor]
) -> list[float]:
    """Compare the gradient of every optimizer update with the gradient of `naive_loss(number)`.

    Both are gradients at the parameters before the update.

    Returns:
        The relative distances. The list is filled while the trainer updates.
    """
    take_step, distances = trainer.optimizer.step, []

    def compare_and_step(losses):
        parameters = list(trainer.policy.model.parameters())
        ours = torch.cat([p.grad.flatten() for p in parameters])
        gradients = torch.autograd.grad(naive_loss(len(distances)), parameters)
        expected = torch.cat([g.flatten() for g in gradients])
        distances.append(float((ours - expected).norm() / expected.norm()))
        return take_step(losses)

    monkeypatch.setattr(trainer.optimizer, "step", compare_and_step)
    return distances
