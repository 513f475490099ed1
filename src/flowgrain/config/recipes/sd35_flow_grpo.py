"""Flow-GRPO on SD3.5-medium at the paper's settings (arXiv 2505.05470).

    flowgrain train sd35_flow_grpo prompts=a.txt eval_prompts_file=b.txt reward_models=pickscore=PICKSCORE

Hardware: an adapter over 4.5 GB of bf16 weights: one GPU, where the papers had 16 and more. `sd35_flow_grpo_lora` is for one of
80 GB.
Cost of a prompt: 240 sampling passes, 216 with gradient, 24 decodes; 48 prompts a step, 1,000 steps. CFG makes two rows of each
pass.
Expected: published (DenseGRPO's table): PickScore 21.72 -> 23.31 (here .2172 -> .2331) at 40 inference steps; not run here.
"""

from typing import Any

from flowgrain.config.recipes._models import EMA, LORA, SD35


def recipe() -> dict[str, Any]:
    """Flow-GRPO on SD3.5-medium."""
    return {**SD35, **LORA, **EMA, "method": "flow_grpo", "kl_weight": 0.01}
