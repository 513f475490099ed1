"""DiffusionNFT on SD3.5-medium with its paper's settings (arXiv 2509.16117) and those of this model's recipes.

    flowgrain train sd35_diffusionnft prompts=a.txt eval_prompts_file=b.txt reward_models=pickscore=PICKSCORE

Hardware: an adapter over 4.5 GB of bf16 weights, and as much again for the old policy: one GPU. `sd35_diffusionnft_lora` is for
one of 80 GB.
Cost of a prompt: 240 sampling passes, 216 with gradient, 24 decodes; 48 prompts a step, 1,000 steps.
Expected: no figure is published for this method on this model, and none was measured here.
"""

from typing import Any

from flowgrain.config.recipes._models import LORA, SD35


def recipe() -> dict[str, Any]:
    """DiffusionNFT on SD3.5-medium."""
    return {**SD35, **LORA, "method": "diffusionnft", "guidance_scale": 1.0}
