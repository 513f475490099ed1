"""DiffusionNFT on FLUX.1-dev with its paper's settings (arXiv 2509.16117) and those of this model's recipes.

    flowgrain train flux_diffusionnft prompts=a.txt eval_prompts_file=b.txt reward_models=hps=CLIP-H#HPS.safetensors,clip=CLIP

Hardware: an adapter over 24 GB of bf16 weights, and as much again for the old policy: one GPU. `flux_diffusionnft_lora` is for
one of 80 GB.
Cost of a prompt: 240 sampling passes, 216 with gradient, 24 decodes; 16 prompts a step, 300 steps.
Expected: no figure is published for this method on this model, and none was measured here.
"""

from typing import Any

from flowgrain.config.recipes._models import FLUX, LORA


def recipe() -> dict[str, Any]:
    """DiffusionNFT on FLUX.1-dev."""
    return {**FLUX, **LORA, "method": "diffusionnft"}
