"""A run of the toy backbone in a process of its own, to be killed: python tests/toy_run.py FOLDER"""

import sys

import torch
from toy import PROMPTS, Toy, red

from flowgrain import Run
from flowgrain.settings import settings

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

if __name__ == "__main__":
    torch.set_num_threads(1)
    run = Run(SETTINGS, sys.argv[1], backbone=Toy(), prompts=PROMPTS, eval_prompts=PROMPTS, rewards={"red": red})
    run.resume()
    run.train()
