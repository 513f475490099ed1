"""Running statistics of the rewards of every prompt (DDPO)."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Rewards = dict[str, list[float]]
"""Rewards by prompt, oldest first."""


@dataclass
class RunningStatistics:
    """The last rewards of every prompt over rollouts.

    The rewards of the last rollout are stored apart from the earlier rewards. A rollout that is
    observed again, because its training step was stopped before its update, replaces itself.

    Attributes:
        size: rewards that are kept per prompt.
        earlier: rewards of the rollouts before training step `step`.
        step: last observed training step.
        latest: rewards of training step `step`.
    """

    size: int
    earlier: Rewards = field(default_factory=dict)
    step: int = 0
    latest: Rewards = field(default_factory=dict)

    def observe(self, step: int, rewards: Iterable[tuple[str, float]]) -> None:
        """Add the rewards of a rollout, as pairs of prompt and reward."""
        if step != self.step:
            for prompt in self.latest:
                self.earlier[prompt] = self.of(prompt)
        grouped: defaultdict[str, list[float]] = defaultdict(list)
        for prompt, reward in rewards:
            grouped[prompt].append(reward)
        self.step, self.latest = step, dict(grouped)

    def of(self, prompt: str) -> list[float]:
        """The last `size` rewards of a prompt, including the last rollout."""
        return [*self.earlier.get(prompt, ()), *self.latest.get(prompt, ())][-self.size :]

    def state_dict(self) -> dict[str, Any]:
        """The rewards as plain JSON values."""
        return {"earlier": self.earlier, "step": self.step, "latest": self.latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.earlier = {prompt: list(values) for prompt, values in state["earlier"].items()}
        self.step = int(state["step"])
        self.latest = {prompt: list(values) for prompt, values in state["latest"].items()}
