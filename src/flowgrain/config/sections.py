"""Sections of the configuration that belong to no other package.

The packages models, methods and rewards define the sections of their own settings.
"""

from typing import Annotated, Literal

from pydantic import Field, Strict

from flowgrain.config.economy import TAIL_CACHE, AdaptiveGroupsConfig, ExploreConfig
from flowgrain.config.limits import MAX_PROMPTS, MAX_ROWS, MAX_STEPS
from flowgrain.config.record import RecordConfig
from flowgrain.rewards.base import RewardConfig
from flowgrain.settings import Section, Setting, StrTuple

SHORT = 64
"""Images of an evaluation if evaluation.every is not set."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Gigabytes = Annotated[float, Field(ge=0, le=1e5)]
Rewards = Annotated[tuple[RewardConfig, ...], Strict(False)]


class LoraConfig(Section):
    """Low-rank adapters (LoRA). Rank 0 is a full fine-tune."""

    rank: int = Setting(
        0, "Rank of the adapters. 0: train all parameters.", keep=True, ge=0, le=4096
    )
    alpha: float | None = Setting(
        None, "Scale of the adapters. Default: twice the rank.", keep=True, gt=0, le=1e5
    )
    target_modules: StrTuple | None = Setting(
        None,
        "Layers that take adapters, as ends of their names. Default: the attention layers of the "
        "model.",
        keep=True,
        min_length=1,
    )

    def check(self) -> None:
        """Check that there are adapters for the settings of adapters.

        Raises:
            ValueError: there are none.
        """
        for name in ("alpha", "target_modules"):
            value = getattr(self, name)
            if self.rank == 0 and value is not None:
                raise ValueError(
                    f"lora.{name}={value}: has no effect without adapters. "
                    f"Set lora.rank, or use lora.{name}=null."
                )


class SamplingConfig(Section):
    """How images are sampled during training."""

    num_steps: int = Setting(
        16,
        "Sampling steps during training (T). The default depends on the method.",
        unit="steps",
        keep=True,
        ge=2,
        le=1000,
    )
    grid: Literal["shifted", "model"] = Setting(
        "shifted",
        "Noise grid: evenly spaced levels with sampling.shift (shifted), or the grid of the "
        "model's own pipeline (model).",
        keep=True,
    )
    shift: Annotated[float, Field(gt=0, le=1000)] | Literal["auto"] | None = Setting(
        None,
        "Timestep shift of the noise grid. auto: the shift of the model's own pipeline. "
        "Default: 3, or the model's with sampling.grid=model.",
        keep=True,
    )
    shift_terminal: float | None = Setting(
        None,
        "Stretch the grid so that its last step starts at this noise level (Qwen-Image). "
        "Default: not stretched.",
        keep=True,
        gt=0,
        lt=1,
    )
    sigma_min: float | None = Setting(
        None,
        "Last noise level above 0, before the shift. Default: 1 / num_steps.",
        keep=True,
        gt=0,
        lt=1,
    )
    guidance_scale: float = Setting(
        1.0,
        "Guidance scale during training: true CFG, or embedded guidance for FLUX.1. "
        "1 disables true CFG.",
        ge=0,
        le=1000,
    )
    batch_size: int = Setting(128, "Rows in one model call.", unit="rows", ge=1, le=MAX_ROWS)
    decode_batch_size: int | None = Setting(
        None,
        "Images that are decoded together. A large VAE needs more memory than sampling. "
        "Default: sampling.batch_size.",
        unit="images",
        ge=1,
        le=MAX_ROWS,
    )
    prompts_per_chunk: int | None = Setting(
        None,
        "Prompts that are sampled together. The rewards of a chunk are computed while the next "
        "chunk is sampled. Default: all prompts.",
        unit="prompts",
        ge=1,
        le=MAX_PROMPTS,
    )
    tail_cache: str = Setting(
        "none",
        "Feature cache for the tail, the steps after the last stochastic step: none, "
        "first_block:THRESHOLD or taylorseer:INTERVAL.",
        pattern=TAIL_CACHE,
    )
    tail_weights: Literal["same", "int8", "float8"] = Setting(
        "same",
        "Model weights for the tail: the same as for other steps, or a copy quantized by torchao.",
    )
    explore: ExploreConfig = Setting(ExploreConfig(), "Cheap candidates of every group.")

    def check_exact(self, method: str) -> None:
        """Check that images are exact samples, because `method` trains on them.

        Raises:
            ValueError: a setting makes them approximate.
        """
        for setting, value, exact in (
            ("tail_cache", self.tail_cache, "none"),
            ("tail_weights", self.tail_weights, "same"),
        ):
            if value != exact:
                raise ValueError(
                    f"sampling.{setting}={value}: method {method!r} trains on the images, and "
                    f"approximate images would be its target. Sample them exactly: "
                    f"sampling.{setting}={exact}."
                )

    def check(self) -> None:
        """Check that the grid of the model is not also given as numbers.

        Raises:
            ValueError: it is.
        """
        for name in ("shift", "shift_terminal", "sigma_min"):
            value = getattr(self, name)
            if self.grid == "model" and value not in (None, "auto"):
                raise ValueError(
                    f"sampling.{name}={value}: has no effect with sampling.grid=model. Use "
                    f"sampling.{name}=null. The settings of a run contain the numbers of the "
                    "model's grid already: leave out sampling.grid=model to resume it."
                )


class OptimizerConfig(Section):
    """AdamW and gradient clipping."""

    learning_rate: float | None = Setting(
        None,
        "Learning rate. Default: the published rate of the method for a full fine-tune or a LoRA.",
        gt=0,
    )
    weight_decay: float = Setting(1e-4, "Decoupled weight decay.", ge=0, le=100)
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = Setting(
        (0.9, 0.999), "Decay rates of the moment estimates."
    )
    max_grad_norm: float = Setting(1.0, "Gradients are clipped to this norm.", ge=1e-6, le=1e12)
    max_skipped_updates: int = Setting(
        3,
        "Stop after this many updates in a row with a non-finite loss or gradient.",
        unit="updates",
        ge=1,
        le=MAX_STEPS,
    )


class TrainingConfig(Section):
    """Length of the run, batch sizes, EMA and checkpoints."""

    max_steps: int = Setting(
        100,
        "Training steps. A step is one rollout and its updates.",
        unit="steps",
        ge=1,
        le=MAX_STEPS,
    )
    max_seconds: float | None = Setting(
        None,
        "Stop after the step in which the training time exceeds this limit. Default: no limit.",
        unit="seconds",
        gt=0,
        le=1e9,
    )
    prompts_per_step: int = Setting(
        24, "Prompts per training step, over all ranks.", unit="prompts", ge=1, le=MAX_PROMPTS
    )
    micro_batch_size: int | None = Setting(
        None,
        "Rows in one forward pass with gradient. Default: sampling.batch_size.",
        unit="rows",
        ge=1,
        le=MAX_ROWS,
    )
    graph_memory: Gigabytes | Literal["all"] = Setting(
        0.0,
        "Memory per rank for autograd graphs of the rollout, which replace forward passes of the "
        "update. all: no limit. 0: no graph is kept. Needs method.updates_per_rollout=1.",
        unit="GB",
    )
    ema_decay: float = Setting(
        0.0,
        "Decay of the EMA of the parameters. Evaluation and export use the EMA. 0: no EMA.",
        ge=0,
        lt=1,
    )
    ema_every: int = Setting(
        1, "Optimizer updates between two EMA updates.", unit="updates", ge=1, le=MAX_STEPS
    )
    max_failed_rewards: float = Setting(
        0.2,
        "Stop if more than this share of the images of a step or evaluation have no score.",
        ge=0,
        le=1,
    )
    checkpoint_every: int = Setting(
        10,
        "Steps between checkpoints. 0: only the last step.",
        unit="steps",
        ge=0,
        le=MAX_STEPS,
    )
    keep_checkpoints: int = Setting(
        2,
        "Latest checkpoints to keep, in addition to the best checkpoint.",
        unit="checkpoints",
        ge=1,
        le=MAX_STEPS,
    )
    record: RecordConfig = Setting(RecordConfig(), "Recorded groups of training steps.")
    adaptive_groups: AdaptiveGroupsConfig = Setting(
        AdaptiveGroupsConfig(), "Replacement of prompts whose rewards have no spread."
    )


class EvaluationConfig(Section):
    """Evaluation on held-out prompts."""

    every: int | None = Setting(
        None,
        "Steps between evaluations. 0: never. Default: a short evaluation of at most 64 images "
        "before the first step and after the last step.",
        unit="steps",
        ge=0,
        le=MAX_STEPS,
    )
    num_steps: int = Setting(16, "ODE steps of an evaluation image.", unit="steps", ge=1, le=1000)
    num_prompts: int = Setting(
        256,
        "Images per evaluation. If there are fewer prompts, they are repeated with other noise.",
        unit="images",
        ge=1,
        le=MAX_PROMPTS,
    )
    split: Literal["held-out", "validation"] = Setting(
        "held-out",
        "Bundled prompts of the model to evaluate. Choose settings on validation, and report "
        "results on held-out.",
    )
    guidance_scale: float | None = Setting(
        None, "Guidance scale of evaluation. Default: sampling.guidance_scale.", ge=0, le=1000
    )
    rewards: Rewards = Setting(
        (), "Additional rewards to evaluate. The trained rewards are always evaluated."
    )

    def is_due(self, step: int, last: bool) -> bool:
        """Whether the policy is evaluated after training step `step`. Step 0: before training."""
        if self.every == 0:
            return False
        return step == 0 or last or (self.every is not None and step % self.every == 0)

    @property
    def images_of_run(self) -> int:
        """Images of an evaluation during a run."""
        return self.num_prompts if self.every is not None else min(self.num_prompts, SHORT)


class RuntimeConfig(Section):
    """Seed, device and process settings."""

    seed: int = Setting(0, "Seed of all randomness.", keep=True, ge=0, le=2**63 - 1)
    device: Literal["auto", "cpu", "cuda"] = Setting(
        "auto", "Compute device. auto: cuda if available."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Setting(
        "auto",
        "Compute dtype. auto: bfloat16 on a GPU, float32 on a CPU. float16 scales the loss.",
        keep=True,
    )
    threads: int = Setting(
        0,
        "CPU threads per process. 0: torch's default, or with several processes an equal share of "
        "the cores.",
        unit="threads",
        ge=0,
        le=1024,
    )
    compile: Literal["inductor", "aot_eager"] | None = Setting(
        None,
        "Backend of torch.compile for the repeated blocks. Batches are padded to a fixed size. "
        "Default: no compilation.",
    )
    rollout_weights: Literal["auto", "replica", "sharded"] = Setting(
        "auto",
        "With several ranks: sample with a full copy per rank (replica), or with sharded "
        "parameters. auto: replica if it fits into the free memory.",
    )
    gradient_reduction: Literal["update", "micro_batch"] = Setting(
        "update",
        "With sharded parameters: sum gradients over ranks once per update (update), or after "
        "every micro-batch (micro_batch), which moves more bytes, but holds no unsharded "
        "gradients.",
    )
    context_parallel: int = Setting(
        1,
        "Ranks that divide the tokens of every row (context parallelism). 1: a rank computes whole "
        "rows.",
        unit="ranks",
        ge=1,
        le=64,
    )
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Strict(False)] = (
        Setting((), "Trackers that receive copies of the records: tensorboard, wandb, trackio.")
    )
    plugins: StrTuple = Setting((), "Python files that register methods, rewards or backbones.")
