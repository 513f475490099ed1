"""Where rollouts are sampled and scored: in the training process or in workers."""

from flowgrain.training.rollouts.source import RolloutSource, rollout_source

__all__ = ["RolloutSource", "rollout_source"]
