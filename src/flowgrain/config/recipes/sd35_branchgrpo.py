"""BranchGRPO on SD3.5-medium with its paper's settings (arXiv 2509.06040) and those of this model's recipes.

    flowgrain train sd35_branchgrpo prompts=a.txt eval_prompts_file=b.txt reward_models=pickscore=PICKSCORE

Hardware: a full fine-tune of 2.2 billion weights holds 40 GB (masters, gradients, AdamW, a bf16 copy that samples) beside
activations: one GPU. `sd35_branchgrpo_lora` is for one of 80 GB.
Cost of a prompt: 203 sampling passes, 187 with gradient, 16 decodes; 16 prompts a step, 300 steps. CFG makes two rows of each
pass.
Expected: no figure is published for this method on this model, and none was measured here.
"""

from typing import Any

from flowgrain.config.recipes._models import SD35


def recipe() -> dict[str, Any]:
    """BranchGRPO on SD3.5-medium."""
    return {**SD35, "method": "branchgrpo", "learning_rate": 1e-5, "prompts_per_step": 16, "max_steps": 300}
