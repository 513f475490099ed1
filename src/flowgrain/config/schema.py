"""The settings of a run: nested sections of typed fields."""

from collections.abc import Mapping
from typing import Any

from pydantic import field_serializer, field_validator, model_validator
from torch import Tensor

from flowgrain.config.combinations import check_combinations
from flowgrain.config.data import DataConfig
from flowgrain.config.rollout import RolloutConfig
from flowgrain.config.sections import (
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    Rewards,
    RuntimeConfig,
    SamplingConfig,
    TrainingConfig,
)
from flowgrain.config.warnings import warnings_of
from flowgrain.config.watch import WatchConfig
from flowgrain.core.given import image_tree
from flowgrain.core.schedule import TailSchedule
from flowgrain.core.sde import Shift, sigma_grid
from flowgrain.core.tree import Tree
from flowgrain.image_data import IMAGES_OF_PROMPT
from flowgrain.methods import Method, build_method, plan_tree
from flowgrain.models.base import Backbone, ModelConfig
from flowgrain.rewards.base import RewardConfig
from flowgrain.settings import Section, Setting


class Config(Section):
    """All settings of a run. Create it with `load_config`."""

    name: str = Setting(
        "run",
        "Name of the run. Its directory is runs/NAME.",
        pattern=r"^\w[\w.+-]*$",
        max_length=100,
    )
    method: Method = Setting(..., "Training method and its options.")
    model: ModelConfig = Setting(ModelConfig(), "Backbone.")
    lora: LoraConfig = Setting(LoraConfig(), "Low-rank adapters.")
    sampling: SamplingConfig = Setting(SamplingConfig(), "Sampling during training.")
    rollout: RolloutConfig = Setting(RolloutConfig(), "Worker processes that sample.")
    rewards: Rewards = Setting(..., "Trained rewards.", min_length=1)
    optimizer: OptimizerConfig = Setting(OptimizerConfig(), "AdamW.")
    training: TrainingConfig = Setting(TrainingConfig(), "The training loop.")
    evaluation: EvaluationConfig = Setting(EvaluationConfig(), "Evaluation on held-out prompts.")
    watch: WatchConfig = Setting(WatchConfig(), "Monitors, and what counts as an alarm.")
    data: DataConfig = Setting(DataConfig(), "Prompt files and data sets.")
    runtime: RuntimeConfig = Setting(RuntimeConfig(), "Seed, device and processes.")

    def sigmas(self, num_steps: int | None = None) -> Tensor:
        """Noise levels [T + 1] of a grid with `num_steps` steps. Default: sampling.num_steps.

        Before `with_grid_of`, a shift of the model counts as 3. The cost of a plan does not
        depend on the grid.
        """
        sampling = self.sampling
        shift = sampling.shift if isinstance(sampling.shift, float) else 3.0
        steps = num_steps or sampling.num_steps
        return sigma_grid(steps, shift, sampling.shift_terminal, sampling.sigma_min)

    @property
    def grid_is_known(self) -> bool:
        """Whether the grid does not depend on the model, or `with_grid_of` has resolved it."""
        return self.sampling.grid == "shifted" and self.sampling.shift != "auto"

    def with_grid_of(self, backbone: Backbone) -> "Config":
        """This configuration with numbers in place of sampling.grid=model or sampling.shift=auto.

        The grid of the result is "shifted". sampling.shift_terminal and sampling.sigma_min are kept
        if they are set.
        """
        if self.grid_is_known:
            return self
        sampling = self.sampling
        natural = Shift(*backbone.natural_shift(sampling.num_steps))
        sigma_min = natural.sigma_min if sampling.grid == "model" else sampling.sigma_min
        numbers = {
            "shift": float(natural.shift),
            "shift_terminal": sampling.shift_terminal or natural.terminal,
            "sigma_min": sigma_min,
            "grid": "shifted",
        }
        return self.model_copy(update={"sampling": sampling.model_copy(update=numbers)})

    def resolved(self, backbone: Backbone) -> "Config":
        """This configuration with numbers in place of values that depend on model and method.

        These are the grid, see `with_grid_of`, and the learning rate.
        """
        optimizer = self.optimizer.model_copy(update={"learning_rate": self.learning_rate})
        return self.with_grid_of(backbone).model_copy(update={"optimizer": optimizer})

    @property
    def learning_rate(self) -> float:
        """The learning rate: optimizer.learning_rate, or the published rate of the method.

        Raises:
            ValueError: none was published for this kind of training.
        """
        own, lora = self.optimizer.learning_rate, self.lora.rank > 0
        return self.method.published_learning_rate(lora=lora) if own is None else own

    def tree(self, step: int = 1) -> Tree:
        """The tree of one prompt at training step `step`."""
        steps, seed = self.sampling.num_steps, self.runtime.seed
        if self.data.kind is not None:
            return image_tree(steps, IMAGES_OF_PROMPT[self.data.kind])
        return plan_tree(self.method, steps, step, seed, self.sigmas().tolist())

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
        """Images in one call of every reward, by name."""
        return {r.name: r.batch_size for r in (*self.evaluation.rewards, *self.rewards)}

    def to_dict(self) -> dict[str, Any]:
        """Nested values of plain types, as in a YAML file."""
        return self.model_dump(mode="json")

    def warnings(self) -> list[str]:
        """See `warnings_of`."""
        return list(warnings_of(self))

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
        check_combinations(self)

    @model_validator(mode="after")
    def _checked(self) -> "Config":
        self.check_combinations()
        return self
