"""DenseGRPO on SD3.5-medium at the paper's settings (arXiv 2601.20218).

    flowgrain train sd35_densegrpo prompts=a.txt eval_prompts_file=b.txt reward_models=pickscore=PICKSCORE

Hardware: an adapter over 4.5 GB of bf16 weights: one GPU, where the papers had 16 and more. `sd35_densegrpo_lora` is for one of
80 GB.
Cost of a prompt: 1,320 sampling passes, 240 with gradient, 264 decodes; 48 prompts a step, 1,000 steps. Calibration before the
first step: 70,400 passes. CFG makes two rows of each pass.
Expected: published: PickScore 21.72 -> 24.64 (here .2172 -> .2464) at 40 inference steps; not run here.
"""

from typing import Any

from flowgrain.config.recipes._models import EMA, LORA, SD35


def recipe() -> dict[str, Any]:
    """DenseGRPO on SD3.5-medium."""
    return {**SD35, **LORA, **EMA, "method": "densegrpo", "kl_weight": 0.01}
