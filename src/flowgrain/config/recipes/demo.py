"""The first thing to run: the bundled shapes model aligned with its exact oracle by G2RPO, in minutes on two CPU cores.

    flowgrain train            (or: make demo)

Costs and gains, measured on two cores with three seeds, are in benchmarks/results/; docs/log.md tells how the learning
rate, the batch and the number of steps were chosen.
"""

from typing import Any


def recipe() -> dict[str, Any]:
    """G2RPO on a grid of 8 steps, noise in the first half, two granularities."""
    return {
        "method": "g2rpo",
        "num_steps": 8,
        "granularities": (1, 2),
        "prompts_per_step": 16,
        "max_steps": 60,
        "learning_rate": 1.5e-4,
        "ema_decay": 0.95,
        "eval_every": 20,
        "eval_prompts": 302,
        "checkpoint_every": 10,
    }
