"""GRPO-Guard on SD3.5-medium with its paper's settings (arXiv 2510.22319) and those of this model's recipes.

    flowgrain train sd35_grpo_guard prompts=a.txt eval_prompts_file=b.txt reward_models=pickscore=PICKSCORE

Hardware: an adapter over 4.5 GB of bf16 weights: one GPU, where the papers had 16 and more. `sd35_grpo_guard_lora` is for one
of 80 GB.
Cost of a prompt: 240 sampling passes, 216 with gradient, 24 decodes; 48 prompts a step, 1,000 steps. CFG makes two rows of each
pass.
Expected: no figure is published for this method on this model, and none was measured here.
"""

from typing import Any

from flowgrain.config.recipes._models import EMA, LORA, SD35


def recipe() -> dict[str, Any]:
    """GRPO-Guard on SD3.5-medium."""
    return {**SD35, **LORA, **EMA, "method": "grpo_guard", "kl_weight": 0.01}
