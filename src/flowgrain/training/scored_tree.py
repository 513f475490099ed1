"""The result of sampling a tree for several prompts.

Shapes: I images.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flowgrain.core.rollout import Rollout
from flowgrain.models import Conditioning
from flowgrain.rewards import Scores


@dataclass(frozen=True)
class ScoredTree:
    """A tree of one prompt, executed for several prompts and scored.

    cond, rollout and images belong to the prompts of this rank. scores and monitors [I] belong to
    all prompts. sampled_with: see `RolloutBatch`.
    """

    cond: Conditioning
    rollout: Rollout
    images: Tensor
    scores: dict[str, Scores]
    monitors: dict[str, Tensor]
    sampled_with: Mapping[str, Tensor] | None = None
