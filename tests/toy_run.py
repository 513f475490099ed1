"""A run of the toy backbone, for a process of its own that is killed."""

from pathlib import Path

import diffusers.training_utils  # noqa: F401  imported before the fork, and not after each
import torch
from toy import PROMPTS, Toy, red

from flowgrain import Run
from flowgrain.config.schema import settings

SETTINGS = settings(
    {
        "num_steps": 4,
        "group_size": 3,
        "prompts_per_step": 2,
        "max_steps": 40,
        "checkpoint_every": 1,
        "eval_every": 4,
        "eval_prompts": 4,
        "eval_num_steps": 3,
        "eval_rewards": (),
        "ema_decay": 0.9,
        "threads": 1,
    }
)


def toy_run(folder: Path) -> None:
    torch.set_num_threads(1)
    run = Run(SETTINGS, folder, backbone=Toy(), prompts=PROMPTS, eval_prompts=PROMPTS, rewards={"red": red})
    run.report = lambda: folder / "report.html"  # drawing takes longer than the run
    run.resume()
    run.train()
