"""MixGRPO-Flash* on FLUX.1-dev with its paper's settings (arXiv 2507.21802) and those of this model's recipes.

    torchrun --nproc-per-node 8 -m flowgrain train flux_mixgrpo_flash_star prompts=a.txt eval_prompts_file=b.txt \\
        reward_models=hps=CLIP-H#HPS.safetensors,clip=CLIP

Hardware: a full fine-tune of 11.9 billion weights holds 214 GB (masters, gradients, AdamW, a bf16 copy that samples), sharded over
the GPUs; the papers had 16 and more. `flux_mixgrpo_flash_star_lora` is for one of 80 GB.
Cost of a prompt: 85 sampling passes, 37 with gradient, 12 decodes; 16 prompts a step, 300 steps.
Expected: no figure is published for this method on this model, and none was measured here.
"""

from typing import Any

from flowgrain.config.recipes._models import FLUX


def recipe() -> dict[str, Any]:
    """MixGRPO-Flash* on FLUX.1-dev."""
    return {**FLUX, "method": "mixgrpo_flash_star", "learning_rate": 1e-5}
