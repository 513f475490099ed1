"""G2RPO on SD3.5-medium with its paper's settings (arXiv 2510.01982) and those of this model's recipes.

    flowgrain train sd35_g2rpo prompts=a.txt eval_prompts_file=b.txt reward_models=pickscore=PICKSCORE

Hardware: a full fine-tune of 2.2 billion weights holds 40 GB (masters, gradients, AdamW, a bf16 copy that samples) beside
activations: one GPU. `sd35_g2rpo_lora` is for one of 80 GB.
Cost of a prompt: 1,708 sampling passes, 8 with gradient, 289 decodes; 16 prompts a step, 300 steps. CFG makes two rows of each
pass.
Expected: no figure is published for this method on this model, and none was measured here.
"""

from typing import Any

from flowgrain.config.recipes._models import SD35


def recipe() -> dict[str, Any]:
    """G2RPO on SD3.5-medium."""
    return {**SD35, "method": "g2rpo", "learning_rate": 2e-6, "max_steps": 300, "prompts_per_step": 16}
