"""Rewards: functions of images [I, 3, H, W] in 0..1 and prompts that return I scores."""

from flowgrain.rewards.base import (
    REWARDS,
    SHAPES_REWARDS,
    Explains,
    Explanation,
    GroupReward,
    Reward,
    RewardConfig,
    Unscored,
    build_reward,
    register_reward,
)
from flowgrain.rewards.gradient import (
    DIFFERENTIABLE,
    NoGradient,
    differentiable,
    gradient,
    is_custom,
    is_differentiable,
    total_gradient,
)
from flowgrain.rewards.options import OptionError
from flowgrain.rewards.pairwise import PAIR_JUDGES, PairJudge, register_pair_judge
from flowgrain.rewards.scoring import (
    NOT_FINITE,
    PartScores,
    Scorer,
    Scores,
    score,
    score_with_parts,
)

__all__ = [
    "DIFFERENTIABLE",
    "NOT_FINITE",
    "PAIR_JUDGES",
    "REWARDS",
    "SHAPES_REWARDS",
    "Explains",
    "Explanation",
    "GroupReward",
    "NoGradient",
    "OptionError",
    "PairJudge",
    "PartScores",
    "Reward",
    "RewardConfig",
    "Scorer",
    "Scores",
    "Unscored",
    "build_reward",
    "differentiable",
    "gradient",
    "is_custom",
    "is_differentiable",
    "register_pair_judge",
    "register_reward",
    "score",
    "score_with_parts",
    "total_gradient",
]
