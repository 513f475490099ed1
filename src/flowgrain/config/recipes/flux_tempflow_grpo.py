"""TempFlow-GRPO on FLUX.1-dev with its paper's settings (arXiv 2508.04324) and those of this model's recipes.

    flowgrain train flux_tempflow_grpo prompts=a.txt eval_prompts_file=b.txt reward_models=hps=CLIP-H#HPS.safetensors,clip=CLIP

Hardware: an adapter over 24 GB of bf16 weights: one GPU, where the papers had 16 and more. `flux_tempflow_grpo_lora` is for one
of 80 GB.
Cost of a prompt: 279 sampling passes, 9 with gradient, 54 decodes; 16 prompts a step, 300 steps.
Expected: no figure is published for this method on this model, and none was measured here.
"""

from typing import Any

from flowgrain.config.recipes._models import EMA, FLUX, LORA


def recipe() -> dict[str, Any]:
    """TempFlow-GRPO on FLUX.1-dev."""
    return {**FLUX, **LORA, **EMA, "method": "tempflow_grpo", "kl_weight": 0.0}
