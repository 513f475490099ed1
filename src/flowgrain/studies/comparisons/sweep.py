"""The learning rates of the full comparison: the same few for every method, on a seed and on prompts that its table does not use.

flowgrain compare sweep --jobs 2
"""

from typing import Any

from flowgrain.studies.comparisons import full


def comparison() -> dict[str, Any]:
    """Every method of the full comparison at every rate."""
    return {
        **full.comparison(),
        "name": "sweep",
        "rewards": {"towers": "towers"},
        "seeds": (100,),
        "learning_rates": (3e-5, 1e-4, 3e-4, 1e-3),
        "common": {**full.COMMON, "eval_split": "validation"},
        "eval_steps": (16,),
        "curve_points": 0,
    }
