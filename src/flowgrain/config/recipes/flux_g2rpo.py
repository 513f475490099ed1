"""G2RPO on FLUX.1-dev at the paper's settings (arXiv 2510.01982).

    torchrun --nproc-per-node 8 -m flowgrain train flux_g2rpo prompts=a.txt eval_prompts_file=b.txt \\
        reward_models=hps=CLIP-H#HPS.safetensors,clip=CLIP

Hardware: a full fine-tune of 11.9 billion weights holds 214 GB (masters, gradients, AdamW, a bf16 copy that samples), sharded over
the GPUs; the papers had 16 and more. `flux_g2rpo_lora` is for one of 80 GB.
Cost of a prompt: 1,708 sampling passes, 8 with gradient, 289 decodes; 16 prompts a step, 301 steps.
Expected: published: HPS .305 -> .376, CLIP score .388 -> .406, ImageReward 1.040 -> 1.483 on HPDv2's 400 test prompts; not run
here.
"""

from typing import Any

from flowgrain.config.recipes._models import FLUX


def recipe() -> dict[str, Any]:
    """G2RPO on FLUX.1-dev."""
    return {**FLUX, "method": "g2rpo", "learning_rate": 2e-6, "max_steps": 301}
