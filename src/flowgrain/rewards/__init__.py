"""Rewards: functions (images [I, 3, H, W] in 0..1, prompts) -> scores [I], NaN where one could not be given."""

from flowgrain.rewards.base import (
    OF_SHAPES,
    REWARDS,
    Explained,
    Explains,
    Prompt,
    Reward,
    RewardSource,
    Scores,
    Scoring,
    explained,
    fields_of,
    load_reward,
    score,
)

__all__ = [
    "OF_SHAPES",
    "REWARDS",
    "Explained",
    "Explains",
    "Prompt",
    "Reward",
    "RewardSource",
    "Scores",
    "Scoring",
    "explained",
    "fields_of",
    "load_reward",
    "score",
]
