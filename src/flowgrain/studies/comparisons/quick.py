"""Three methods, one learned reward, two seeds: a comparison to look at in a quarter of an hour on two cores.

make compare        (or: flowgrain compare quick --jobs 2)
"""

from typing import Any

from flowgrain.studies.comparisons import full


def comparison() -> dict[str, Any]:
    """A small cut of the full comparison."""
    return {
        **full.comparison(),
        "name": "quick",
        "methods": {name: full.METHODS[name] for name in ("g2rpo", "mixgrpo", "flow_grpo")},
        "rewards": {"towers": "towers"},
        "seeds": (1, 2),
        "budget": 40_000,
    }
