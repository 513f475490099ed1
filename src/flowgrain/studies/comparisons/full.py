"""Seven methods, two reward sets, five seeds on the bundled model at equal budget.

    flowgrain compare full --dry-run
    flowgrain compare full --jobs 2

All methods sample on the same grid of 8 steps with groups of 12 and without a KL; everything else is as their papers set it,
scaled where a length of their grid or run appears. Learning rates come from the sweep (flowgrain compare sweep), which was
run on other seeds and on validation prompts; docs/comparison.md has both.
"""

from typing import Any

COMMON: dict[str, Any] = {
    "num_steps": 8,
    "group_size": 12,
    "prompts_per_step": 4,
    "kl_weight": 0,
    "ema_decay": 0.9,
    "eval_prompts": 128,
    "eval_num_steps": 10,
}
# From the base model, 40 rounds of 128 trajectories on `towers` (184,320 passes, once; not in the budget of the runs).
PSI = (3.68, 3.61, 2.48, 1.97, 1.61, 1.34, 1.10, 0.86)
# Learning rates: the best of 3e-5, 1e-4, 3e-4 and 1e-3 by the trained reward, one for each method (flowgrain compare sweep).
METHODS: dict[str, dict[str, Any]] = {
    "g2rpo": {"learning_rate": 3e-4},
    "densegrpo": {"learning_rate": 3e-4, "psi": PSI},
    "mixgrpo": {"learning_rate": 1e-4, "window_size": 2, "window_interval": 4},
    "flow_grpo": {"learning_rate": 3e-4},
    "dancegrpo": {"learning_rate": 1e-4},
    "tempflow_grpo": {"learning_rate": 1e-4},
    "diffusionnft": {"learning_rate": 3e-4},
}


def comparison() -> dict[str, Any]:
    """The whole table."""
    return {
        "name": "full",
        "methods": METHODS,
        "rewards": {"towers": "towers", "towers+preference": "towers,preference"},
        "seeds": (1, 2, 3, 4, 5),
        "budget": 80_000,
        "common": COMMON,
    }
