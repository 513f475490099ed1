"""The source of the scored trees of training steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from flowgrain.core.tree import Tree
from flowgrain.data import Prompt
from flowgrain.training.rollouts.steps import step_noise

if TYPE_CHECKING:
    from flowgrain.config.schema import Config
    from flowgrain.training.collect import RolloutCollector
    from flowgrain.training.scored_tree import ScoredTree


class RolloutSource(Protocol):
    """Executes and scores the trees of training steps."""

    def start(self) -> None:
        """Start the processes of the source. `score` starts them if necessary.

        Raises:
            SettingsError: they cannot be started with these settings.
        """

    def close(self) -> None:
        """End the processes of the source, if it has any."""

    def score(self, step: int, prompts: list[Prompt], tree: Tree) -> ScoredTree:
        """Sample, decode and score `tree` for the prompts of training step `step`.

        Raises:
            StopRequested: a signal arrived.
            Diverged: too many images contain NaN or infinity.
            RunStopped: a worker process failed.
        """

    def state_dict(self, step: int) -> dict[str, Any]:
        """State for the checkpoint of training step `step`, as plain JSON values."""

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Tensors for the checkpoint of training step `step`. Not copies."""

    def load_state_dict(self, step: int, state: Mapping[str, Any]) -> None:
        """Restore the state. Afterwards the checkpoint is read into `tensors`."""


class LocalRollouts:
    """The training process samples. See `RolloutSource`."""

    def __init__(self, collector: RolloutCollector) -> None:
        self.collector = collector

    def start(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def score(self, step: int, prompts: list[Prompt], tree: Tree) -> ScoredTree:
        collector = self.collector
        config = collector.config
        noise = step_noise(config, collector.policy.backbone.latent_shape, step)
        measured = config.watch.action != "off"
        return collector.score_tree(tree, prompts, collector.kernel(), noise, measured, trains=True)

    def state_dict(self, step: int) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def tensors(self, step: int) -> dict[str, Tensor]:  # noqa: ARG002
        return {}

    def load_state_dict(self, step: int, state: Mapping[str, Any]) -> None:
        """Nothing to do."""


def rollout_source(config: Config, collector: RolloutCollector) -> RolloutSource:
    """The source for the section `rollout`: the training process, or workers on Ray."""
    if not config.rollout.workers:
        return LocalRollouts(collector)
    from flowgrain.training.rollouts.workers import WorkerRollouts

    return WorkerRollouts(config, collector)
