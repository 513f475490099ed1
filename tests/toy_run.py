"""A run of the toy backbone, for a separate process that a test kills."""

from pathlib import Path

import diffusers.training_utils  # noqa: F401  imported once before the fork, not after each
import torch
from toy import PROMPTS, Toy, red

from flowgrain.config import load_config
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
    torch.set_num_threads(1)
    trainer = Trainer(
        CONFIG,
        folder,
        backbone=Toy(),
        prompts=PROMPTS,
        eval_prompts=PROMPTS,
        rewards={"red": red},
    )
    trainer.resume()
    trainer.train()
