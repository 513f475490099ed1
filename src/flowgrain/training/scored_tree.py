"""The result of sampling a tree for several prompts.

Shapes: I images of all ranks, J images of this rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flowgrain.core.rollout import Rollout
from flowgrain.distributed import World
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


def gather_scores(
    world: World, scores: Mapping[str, Scores], monitors: Mapping[str, Tensor], count: int
) -> tuple[dict[str, Scores], dict[str, Tensor]]:
    """Scores and monitors of the images of all ranks.

    Args:
        world: ranks. All must call it together.
        scores: scores [J] by reward.
        monitors: values [J] by monitor.
        count: prompts of all ranks.
    """
    assigned = len(world.assign(count))
    own = {name: of_reward.values for name, of_reward in scores.items()}
    reasons = {name: of_reward.reason for name, of_reward in scores.items()}
    ranks = world.gather_data((own, reasons, dict(monitors)))

    def whole(parts: Sequence[Tensor]) -> Tensor:
        per_prompt = [part.reshape(assigned, -1) for part in parts]
        return world.interleave(per_prompt, count).flatten()

    gathered = {}
    for name in ranks[0][0]:
        values = whole([values_of[name] for values_of, _, _ in ranks])
        reason = next((reason[name] for _, reason, _ in ranks if reason[name]), None)
        gathered[name] = Scores(values, int(values.isnan().sum()), reason)
    return gathered, {name: whole([own[name] for _, _, own in ranks]) for name in monitors}
