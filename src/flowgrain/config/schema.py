"""The settings of a run: nested sections of typed fields.

The packages models, methods and rewards define the sections of their own settings.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_serializer, field_validator, model_validator
from torch import Tensor

from flowgrain.core.schedule import TailSchedule
from flowgrain.core.sde import sigma_grid
from flowgrain.core.tree import Tree, tail_length
from flowgrain.methods import Method, build_method, plan_tree
from flowgrain.models.base import ModelConfig
from flowgrain.rewards.base import RewardConfig
from flowgrain.settings import Section, Setting, StrTuple

Beta = Annotated[float, Field(ge=0, lt=1)]
Rewards = Annotated[tuple[RewardConfig, ...], Strict(False)]


class LoraConfig(Section):
    """Low-rank adapters (LoRA). Rank 0 is a full fine-tune."""

    rank: int = Setting(0, "Rank of the adapters. 0: train all parameters.", keep=True, ge=0)
    alpha: float | None = Setting(
        None, "Scale of the adapters. Default: twice the rank.", keep=True, gt=0
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
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = Setting(
        3.0,
        "Timestep shift of the noise grid. auto: the shift of the model's own pipeline.",
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
    guidance_scale: float = Setting(
        1.0,
        "Guidance scale during training: true CFG, or embedded guidance for FLUX.1. "
        "1 disables true CFG.",
        ge=0,
    )
    batch_size: int = Setting(128, "Rows in one model call.", unit="rows", ge=1)
    prompts_per_chunk: int | None = Setting(
        None,
        "Prompts that are sampled together. The rewards of a chunk are computed while the next "
        "chunk is sampled. Default: all prompts.",
        unit="prompts",
        ge=1,
    )
    tail_cache: str = Setting(
        "none",
        "Feature cache for the tail, the steps after the last stochastic step: none, "
        "first_block:THRESHOLD or taylorseer:INTERVAL.",
        pattern=r"^(none|first_block:0?\.\d+|taylorseer:[2-9])$",
    )
    tail_weights: Literal["same", "int8", "float8"] = Setting(
        "same",
        "Model weights for the tail: the same as for other steps, or a copy quantized by torchao.",
    )


class OptimizerConfig(Section):
    """AdamW and gradient clipping."""

    learning_rate: float = Setting(3e-4, "Learning rate.", gt=0)
    weight_decay: float = Setting(1e-4, "Decoupled weight decay.", ge=0)
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = Setting(
        (0.9, 0.999), "Decay rates of the moment estimates."
    )
    max_grad_norm: float = Setting(1.0, "Gradients are clipped to this norm.", gt=0)
    max_skipped_updates: int = Setting(
        3,
        "Stop after this many updates in a row with a non-finite loss or gradient.",
        unit="updates",
        ge=1,
    )


class TrainingConfig(Section):
    """Length of the run, batch sizes, EMA and checkpoints."""

    max_steps: int = Setting(
        100, "Training steps. A step is one rollout and its updates.", unit="steps", ge=1
    )
    max_seconds: float | None = Setting(
        None,
        "Stop after the step in which the training time exceeds this limit. Default: no limit.",
        unit="seconds",
        gt=0,
    )
    prompts_per_step: int = Setting(
        24, "Prompts per training step, over all ranks.", unit="prompts", ge=1
    )
    micro_batch_size: int | None = Setting(
        None,
        "Rows in one forward pass with gradient. Default: sampling.batch_size.",
        unit="rows",
        ge=1,
    )
    ema_decay: float = Setting(
        0.0,
        "Decay of the EMA of the parameters. Evaluation and export use the EMA. 0: no EMA.",
        ge=0,
        lt=1,
    )
    ema_every: int = Setting(1, "Optimizer updates between two EMA updates.", unit="updates", ge=1)
    max_failed_rewards: float = Setting(
        0.2, "Stop if more than this share of a step's images could not be scored.", ge=0, le=1
    )
    checkpoint_every: int = Setting(
        10, "Steps between checkpoints. 0: only the last step.", unit="steps", ge=0
    )
    keep_checkpoints: int = Setting(
        2,
        "Latest checkpoints to keep, in addition to the best checkpoint.",
        unit="checkpoints",
        ge=1,
    )


class EvaluationConfig(Section):
    """Evaluation on held-out prompts."""

    every: int = Setting(0, "Steps between evaluations. 0: never.", unit="steps", ge=0)
    num_steps: int = Setting(16, "ODE steps of an evaluation image.", unit="steps", ge=1)
    num_prompts: int = Setting(
        256,
        "Images per evaluation. If there are fewer prompts, they are repeated with other noise.",
        unit="images",
        ge=1,
    )
    split: Literal["held-out", "validation"] = Setting(
        "held-out",
        "Bundled prompts of the model to evaluate. Choose settings on validation, and report "
        "results on held-out.",
    )
    guidance_scale: float | None = Setting(
        None, "Guidance scale of evaluation. Default: sampling.guidance_scale.", ge=0
    )
    rewards: Rewards = Setting(
        (), "Additional rewards to evaluate. The trained rewards are always evaluated."
    )


class DataConfig(Section):
    """Prompt files."""

    prompts: str | None = Setting(
        None,
        "File with training prompts: .txt, .json, .jsonl, .csv or .parquet. "
        "Default: the model's bundled prompts.",
        keep=True,
    )
    eval_prompts: str | None = Setting(
        None,
        "File with evaluation prompts. Default: the model's bundled prompts, or the last tenth of "
        "data.prompts, which is then not used for training.",
    )


class RuntimeConfig(Section):
    """Seed, device and process settings."""

    seed: int = Setting(0, "Seed of all randomness.", keep=True, ge=0)
    device: Literal["auto", "cpu", "cuda"] = Setting(
        "auto", "Compute device. auto: cuda if available."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Setting(
        "auto", "Compute dtype. auto: bfloat16 on a GPU, float32 on a CPU.", keep=True
    )
    threads: int = Setting(
        0,
        "CPU threads per process. 0: torch's default, or with several processes an equal share of "
        "the cores.",
        unit="threads",
        ge=0,
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
    loggers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Strict(False)] = Setting(
        (), "Loggers to which metrics are also written: tensorboard, wandb."
    )
    plugins: StrTuple = Setting((), "Python files that register methods, rewards or backbones.")


class Config(Section):
    """All settings of a run. Create it with `load_config`."""

    name: str = Setting(
        "run", "Name of the run. Its directory is runs/NAME.", pattern=r"^\w[\w.+-]*$"
    )
    method: Method = Setting(..., "Training method and its options.")
    model: ModelConfig = Setting(ModelConfig(), "Backbone.")
    lora: LoraConfig = Setting(LoraConfig(), "Low-rank adapters.")
    sampling: SamplingConfig = Setting(SamplingConfig(), "Sampling during training.")
    rewards: Rewards = Setting(..., "Trained rewards.", min_length=1)
    optimizer: OptimizerConfig = Setting(OptimizerConfig(), "AdamW.")
    training: TrainingConfig = Setting(TrainingConfig(), "The training loop.")
    evaluation: EvaluationConfig = Setting(EvaluationConfig(), "Evaluation on held-out prompts.")
    data: DataConfig = Setting(DataConfig(), "Prompt files.")
    runtime: RuntimeConfig = Setting(RuntimeConfig(), "Seed, device and processes.")

    def sigmas(self, num_steps: int | None = None) -> Tensor:
        """Noise levels [T + 1] of a grid with `num_steps` steps. Default: sampling.num_steps.

        Until the model is loaded, sampling.shift=auto counts as 3. The cost of a plan does not
        depend on the shift.
        """
        shift = 3.0 if self.sampling.shift == "auto" else self.sampling.shift
        return sigma_grid(num_steps or self.sampling.num_steps, shift, self.sampling.shift_terminal)

    def with_shift(self, shift: float, terminal: float | None) -> "Config":
        """This configuration with the grid of the model in place of sampling.shift=auto.

        sampling.shift_terminal is kept if it is set.
        """
        terminal = self.sampling.shift_terminal or terminal
        sampling = self.sampling.model_copy(update={"shift": shift, "shift_terminal": terminal})
        return self.model_copy(update={"sampling": sampling})

    def tree(self, step: int = 1) -> Tree:
        """The tree of one prompt at training step `step`."""
        return plan_tree(self.method, self.sampling.num_steps, step, self.runtime.seed)

    @property
    def tail_schedule(self) -> TailSchedule:
        """When the rollout evaluates tail rows."""
        if self.sampling.tail_cache != "none":
            return "aligned"
        return "last" if self.sampling.tail_weights != "same" else "interleaved"

    @property
    def eval_guidance(self) -> float:
        """Guidance scale of evaluation."""
        own = self.evaluation.guidance_scale
        return self.sampling.guidance_scale if own is None else own

    @property
    def micro_batch_size(self) -> int:
        """Rows in one forward pass with gradient."""
        return self.training.micro_batch_size or self.sampling.batch_size

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of every trained reward by name."""
        return {reward.name: reward.weight for reward in self.rewards}

    @property
    def reward_batch_sizes(self) -> dict[str, int]:
        """Images in one call of every trained or evaluated reward, by name."""
        return {r.name: r.batch_size for r in (*self.evaluation.rewards, *self.rewards)}

    def to_dict(self) -> dict[str, Any]:
        """Nested values of plain types, as in a YAML file."""
        return self.model_dump(mode="json")

    def with_changes(self, changes: Mapping[str, Any]) -> "Config":
        """A validated copy with `changes` by full path, such as {"method.group_size": 4}.

        Raises:
            SettingsError: a change is not valid.
        """
        from flowgrain.config.load import changed

        return changed(self, changes)

    @field_validator("method", mode="before")
    @classmethod
    def _build_method(cls, value: Any) -> Any:
        return build_method(value) if isinstance(value, Mapping) else value

    @field_serializer("method")
    def _dump_method(self, method: Method) -> dict[str, Any]:
        return {"name": method.name, **method.model_dump(mode="json")}

    @field_validator("rewards")
    @classmethod
    def _distinct_rewards(cls, rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        names = [reward.name for reward in rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"contains {name!r} twice. List every reward once")
        return rewards

    def check_combinations(self) -> None:
        """Check settings that depend on each other.

        Raises:
            ValueError: a combination is impossible.
        """
        try:
            self.method.check(self.sampling.num_steps)
        except ValueError as error:
            raise ValueError(f"method.{error}") from error
        compile_, cache = self.runtime.compile, self.sampling.tail_cache
        if compile_ and self.model.name == "zimage":
            raise ValueError(
                f"runtime.compile={compile_}: prompts of model.name=zimage have different lengths, "
                "and every length would be compiled. Remove runtime.compile."
            )
        if compile_ and cache != "none":
            raise ValueError(
                f"runtime.compile={compile_}: sampling.tail_cache={cache} changes the compiled "
                "blocks. Remove one of the two settings."
            )
        if cache != "none":
            needed = 3 if cache.startswith("taylorseer") else 2
            length = tail_length(self.tree())
            if length < needed:
                raise ValueError(
                    f"sampling.tail_cache={cache}: has no effect on a tail of {length} steps. "
                    f"Remove it, or end the stochastic steps earlier, so that at least {needed} "
                    "steps follow."
                )

    @model_validator(mode="after")
    def _checked(self) -> "Config":
        self.check_combinations()
        return self
