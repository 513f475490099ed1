"""A run of the toy backbone, for a separate process that a test kills."""

import os
import signal
from pathlib import Path
from typing import Any

import diffusers.training_utils  # noqa: F401  imported once before the fork, not after each
import torch
from toy import PROMPTS, Toy, red

from flowgrain.config import Config, load_config
from flowgrain.training import Trainer

CONFIG = load_config(
    "g2rpo",
    {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "training.prompts_per_step": 2,
        "training.max_steps": 40,
        "training.checkpoint_every": 1,
        "training.ema_decay": 0.9,
        "evaluation.every": 4,
        "evaluation.num_prompts": 4,
        "evaluation.num_steps": 3,
        "evaluation.rewards": [],
        "runtime.threads": 1,
    },
)


def toy_run(folder: Path) -> None:
    """Resume the run in `folder`, or start it, and train to the end."""
    train(CONFIG, folder)


def toy_run_of(method: str, changes: dict[str, Any], folder: Path, kill: int | None = None) -> None:
    """Like `toy_run` for a method. The process kills itself in the update of step `kill`."""
    train(load_config(method, changes), folder, kill)


def train(config: Config, folder: Path, kill: int | None = None) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(
        config,
        folder,
        backbone=Toy(),
        prompts=PROMPTS,
        eval_prompts=PROMPTS,
        rewards={"red": red},
    )
    trainer.resume()
    take_step = trainer.optimizer.step

    def take_step_or_die(losses: Any) -> Any:
        result = take_step(losses)
        if trainer.steps_done + 1 == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    trainer.optimizer.step = take_step_or_die
    trainer.train()
