"""What the recipes of one model share, and how any of them is fitted to one 80 GB GPU."""

from typing import Any

FLUX: dict[str, Any] = {
    "model": "flux",
    "weights": "black-forest-labs/FLUX.1-dev",
    "height": 720,
    "width": 720,
    "max_prompt_tokens": 512,
    "long_prompts": "cut",
    "guidance_scale": 3.5,
    "shift": 3.0,
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
    "rows_per_pass": 8,
    "train_rows_per_pass": 1,
    "embedding_cache": "embeddings",
    "rewards": {"hps": 1.0, "clip": 1.0},
    "reward_device": "cuda",
    "reward_batch": 32,
    "prompts_per_step": 16,
    "max_steps": 300,
    "checkpoint_every": 20,
    "eval_every": 50,
    "eval_prompts": 400,
    "eval_num_steps": 16,
    "seed": 42,
}
"""FLUX.1-dev as the G2RPO paper and its baselines run it: HPDv2's prompts, HPS and CLIP score together, 16 prompts a step."""

SD35: dict[str, Any] = {
    "model": "sd3",
    "weights": "stabilityai/stable-diffusion-3.5-medium",
    "height": 512,
    "width": 512,
    "max_prompt_tokens": 256,
    "long_prompts": "cut",
    "guidance_scale": 4.5,
    "shift": 3.0,
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
    "rows_per_pass": 32,
    "train_rows_per_pass": 4,
    "embedding_cache": "embeddings",
    "rewards": {"pickscore": 1.0},
    "reward_device": "cuda",
    "reward_batch": 64,
    "prompts_per_step": 48,
    "max_steps": 1000,
    "checkpoint_every": 50,
    "eval_every": 100,
    "eval_prompts": 500,
    "eval_num_steps": 40,
    "seed": 42,
}
"""SD3.5-medium as Flow-GRPO and DenseGRPO run it for PickScore: 512 pixels, CFG 4.5, 48 prompts a rollout."""

LORA: dict[str, Any] = {"lora_rank": 32, "lora_alpha": 64, "learning_rate": 3e-4}
"""The adapter of Flow-GRPO and those that follow it."""

EMA: dict[str, Any] = {"ema_decay": 0.9, "ema_every": 8}
"""Flow-GRPO's average."""


def one_gpu(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe for one 80 GB GPU: an adapter instead of a full fine-tune, small passes, and rewards off the GPU.

    The learning rate of a full fine-tune is much too small for an adapter; 1e-4 stands in its place and was not tuned.
    """
    adapter = {} if values.get("lora_rank") else {**LORA, "learning_rate": 1e-4}
    small = {"rows_per_pass": 4 if values["model"] == "flux" else 16, "train_rows_per_pass": 1, "prompts_per_rollout": 4}
    return {**values, **adapter, **small, "reward_device": "cpu"}
