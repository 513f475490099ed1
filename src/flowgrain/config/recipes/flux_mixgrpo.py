"""MixGRPO on FLUX.1-dev at the paper's settings (arXiv 2507.21802).

    torchrun --nproc-per-node 8 -m flowgrain train flux_mixgrpo prompts=a.txt eval_prompts_file=b.txt \\
        reward_models=hps=CLIP-H#HPS.safetensors,clip=CLIP

Hardware: a full fine-tune of 11.9 billion weights holds 214 GB (masters, gradients, AdamW, a bf16 copy that samples), sharded over
the GPUs; the papers had 16 and more. `flux_mixgrpo_lora` is for one of 80 GB.
Cost of a prompt in the mean: 228.5 sampling passes, 37 with gradient, 12 decodes; 16 prompts a step, 300 steps.
Expected: published (G2RPO's table): HPS .305 -> .363, CLIP score .388 -> .399, ImageReward 1.040 -> 1.436 on HPDv2's 400 test
prompts; not run here.
"""

from typing import Any

from flowgrain.config.recipes._models import FLUX


def recipe() -> dict[str, Any]:
    """MixGRPO on FLUX.1-dev."""
    return {**FLUX, "method": "mixgrpo", "learning_rate": 1e-5}
