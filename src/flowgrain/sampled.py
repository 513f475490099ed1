"""What a training step holds between its rollout and its update."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowgrain.backbones import Conditioning
from flowgrain.rewards import Scores
from flowgrain.rollout import Rollout
from flowgrain.tree import Ints

Metrics = dict[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class Sampled:
    """What a step has before its update: the filled tree, its images [I, 3, H, W] and the scores of each reward.

    advantage, weight [E] of the rows `credited`: the trained edges, or the leaves where a method trains on images.
    """

    step: int
    prompts: list[str]
    cond: Conditioning
    result: Rollout
    images: Tensor
    scores: dict[str, Scores]
    credited: Ints
    advantage: Tensor
    weight: Tensor
