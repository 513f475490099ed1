"""DDPO (arXiv 2305.13301)."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from flowgrain.core import objective
from flowgrain.core.credit import Normalization, standardize
from flowgrain.core.objective import Objective
from flowgrain.core.tree import Tree
from flowgrain.methods.base import LearningRates, Observation, register
from flowgrain.methods.flow_grpo import FlowGRPO
from flowgrain.methods.options import without_clip_range
from flowgrain.methods.running_statistics import RunningStatistics
from flowgrain.settings import Setting


@register
class DDPO(FlowGRPO):
    """DDPO: independent trajectories, normalized by running statistics of every prompt.

    The mean and the std of a prompt are those of its last rewards over several rollouts. A prompt
    with few rewards uses the mean and the std of the whole batch.
    """

    name = "ddpo"
    title = "DDPO"
    paper = "2305.13301"
    summary = (
        "The trajectories are scored by their final images. The reward is compared with earlier "
        "rewards of the prompt. Every trained step of a trajectory has the same advantage."
    )
    config_defaults = {
        "sampling": {"num_steps": 50},  # published code
        "lora": {"rank": 4},  # published code: the default of diffusers
    }
    learning_rates = LearningRates(lora=3e-4)  # published code
    not_compared = "it compares a reward with earlier rewards of the prompt"

    group_size: int = 8  # own choice
    updates_per_rollout: int | Literal["per_step"] = 4  # published code
    kl_weight: float = 0.0  # published code
    std_epsilon: float = 1e-6  # published code
    estimator: Literal["score", "ppo"] = Setting(
        "ppo",
        "Estimator of the gradient: the score function, with one on-policy update (score), or "
        "PPO's clipped ratio, with several updates (ppo).",
    )  # published code
    buffer_size: int = Setting(
        16,
        "Last rewards of a prompt that are kept for its mean and std.",
        unit="rewards",
        ge=2,
        le=100_000,
    )  # published code
    min_count: int = Setting(
        16,
        "Rewards of a prompt from which on its own mean and std are used. With fewer, those of the "
        "whole batch are used.",
        unit="rewards",
        ge=2,
        le=100_000,
    )  # published code
    _statistics: RunningStatistics = PrivateAttr(default_factory=lambda: RunningStatistics(0))
    _baseline: Tensor | None = PrivateAttr(None)  # [P, 2] mean and std of the observed prompts

    def observe(self, observation: Observation) -> None:
        prompts, tree, values = observation.prompts, observation.tree, observation.rewards.double()
        self._statistics.size = self.buffer_size
        owners = [prompts[number] for number in tree.prompt[tree.leaves]]
        scored = zip(owners, values.tolist(), strict=True)
        self._statistics.observe(
            observation.step, [pair for pair in scored if not math.isnan(pair[1])]
        )
        batch = self._mean_and_std(values)
        own = [torch.tensor(self._statistics.of(p), dtype=torch.float64) for p in prompts]
        self._baseline = torch.stack(
            [self._mean_and_std(v) if len(v) >= self.min_count else batch for v in own]
        )

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """Rewards of the images minus the mean of the prompt, divided by its std.

        Before a rollout is observed, all prompts have the mean and the std of the batch.
        """
        baseline = self._baseline
        if baseline is None or len(baseline) != tree.num_prompts:
            baseline = self._mean_and_std(rewards.double()).expand(tree.num_prompts, 2)
        return standardize(tree, rewards, baseline, how)

    def objective(self, sigmas: Tensor) -> Objective:
        if self.estimator == "score":
            return objective.score_function(self.kl_weight, self.kl_form_of_kernel)
        return super().objective(sigmas)

    def _mean_and_std(self, values: Tensor) -> Tensor:
        """Mean and std [2] of the values that are not NaN."""
        known = values[values.isfinite()]
        if len(known) < 2:
            return torch.tensor([known.sum(), 0.0], dtype=torch.float64)
        return torch.stack([known.mean(), known.std(correction=int(self.std_unbiased))])

    def state_dict(self) -> dict[str, Any]:
        """The running statistics, and the calibrated psi once it exists."""
        return {**super().state_dict(), "statistics": self._statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._statistics.load_state_dict(state["statistics"])

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if self.group_size > self.buffer_size:
            raise ValueError(
                f"group_size={self.group_size}: a prompt never has more than "
                f"method.buffer_size={self.buffer_size} rewards, so some of the images would not "
                f"count. Use method.buffer_size={self.group_size} or more."
            )
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"min_count={self.min_count}: a prompt never has more than "
                f"method.buffer_size={self.buffer_size} rewards. Use at most {self.buffer_size}."
            )
        for option in ("comparison", "std_scope"):
            value = getattr(self, option)
            default = type(self).model_fields[option].default
            if value != default:
                raise ValueError(
                    f"{option}={value}: has no effect, because rewards are compared with the "
                    "running statistics of the prompt. Remove it."
                )
        if self.reward_mix != "reward":
            raise ValueError(
                f"reward_mix={self.reward_mix}: the running statistics are those of the sum of the "
                "rewards. Use method.reward_mix=reward."
            )
        if self.estimator == "score":
            without_clip_range(self, "method.estimator=ppo")
            if self.updates_per_rollout != 1:
                raise ValueError(
                    f"updates_per_rollout={self.updates_per_rollout}: method.estimator=score is "
                    "on-policy. Use method.updates_per_rollout=1, or method.estimator=ppo."
                )
