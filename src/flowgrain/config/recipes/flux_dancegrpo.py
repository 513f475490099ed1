"""DanceGRPO on FLUX.1-dev at the paper's settings (arXiv 2505.07818).

    torchrun --nproc-per-node 8 -m flowgrain train flux_dancegrpo prompts=a.txt eval_prompts_file=b.txt \\
        reward_models=hps=CLIP-H#HPS.safetensors,clip=CLIP

Hardware: a full fine-tune of 11.9 billion weights holds 214 GB (masters, gradients, AdamW, a bf16 copy that samples), sharded over
the GPUs; the papers had 16 and more. `flux_dancegrpo_lora` is for one of 80 GB.
Cost of a prompt in the mean: 181 sampling passes, 101.5 with gradient, 12 decodes; 16 prompts a step, 300 steps.
Expected: published (G2RPO's table): HPS .305 -> .331, CLIP score .388 -> .389, ImageReward 1.040 -> 1.128 on HPDv2's 400 test
prompts; not run here.
"""

from typing import Any

from flowgrain.config.recipes._models import FLUX


def recipe() -> dict[str, Any]:
    """DanceGRPO on FLUX.1-dev."""
    return {**FLUX, "method": "dancegrpo", "learning_rate": 1e-5}
