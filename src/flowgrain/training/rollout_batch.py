"""The data that a training step passes from its rollout to its update.

Shapes: P prompts, E trained edges, I images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from flowgrain.core.rollout import Rollout
from flowgrain.core.tree import Ints, Tree
from flowgrain.data import Prompt
from flowgrain.distributed import World
from flowgrain.models import Conditioning
from flowgrain.rewards import Reward, Scores

Metrics = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of this rank for one forward pass with gradient.

    Attributes:
        rows: rows of this rank's tree.
        counts: whether the rows count. False for a row that a rank repeats, because all ranks must
            run the same number of forward passes.
    """

    rows: Ints
    counts: bool


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts, scores and advantages of one training step.

    Attributes:
        step: training step.
        prompts: P prompts of the step, over all ranks.
        tree: tree of all prompts, without latents. The same on every rank.
        world: ranks. A rank holds every `world.data_size`-th prompt.
        cond: conditioning of this rank's prompts.
        rollout: latents of this rank's prompts.
        images: images of this rank's leaves.
        scores: scores [I] of all images by reward.
        credited: rows of `tree` with an advantage: trained edges [E], or leaves [I] if the method
            trains on images.
        advantage: advantage of each credited row.
        edge_weight: weight of each credited row in the loss.
        known: whether each image [I] has a score that its advantage depends on.
        rewards: trained rewards by name, for methods that use their gradient.
        reward_weights: weight of every reward by name.
        monitors: values [I] of all images by monitor. Empty if nothing was measured.
        more_decodes: images of all ranks that were decoded and scored, but are not trained.
        metrics: metrics of exploration and adaptive groups.
        sampled_with: the parameters that sampled, by name, if they are older than those of the
            policy. None: the policy sampled.
    """

    step: int
    prompts: list[Prompt]
    tree: Tree
    world: World
    cond: Conditioning
    rollout: Rollout
    images: Tensor
    scores: dict[str, Scores]
    credited: Ints
    advantage: Tensor
    edge_weight: Tensor
    known: Tensor
    rewards: Mapping[str, Reward]
    reward_weights: Mapping[str, float]
    monitors: Mapping[str, Tensor] = field(default_factory=dict)
    more_decodes: int = 0
    metrics: Metrics = field(default_factory=dict)
    sampled_with: Mapping[str, Tensor] | None = None

    @property
    def _rows_per_prompt(self) -> int:
        return len(self.tree) // self.tree.num_prompts

    def local_rows(self, rows: Ints) -> Ints:
        """The rows of the whole tree among `rows` that belong to this rank, as rows of its tree."""
        prompt, offset = np.divmod(rows, self._rows_per_prompt)
        world = self.world
        mine = prompt % world.data_size == world.data_rank
        rows_here: Ints = (prompt[mine] // world.data_size) * self._rows_per_prompt + offset[mine]
        return rows_here

    def global_rows(self, rows: Ints) -> Ints:
        """Rows of this rank's tree as rows of the whole tree."""
        prompt, offset = np.divmod(rows, self._rows_per_prompt)
        prompt = prompt * self.world.data_size + self.world.data_rank
        whole: Ints = prompt * self._rows_per_prompt + offset
        return whole

    def prompts_of(self, rows: Ints) -> list[Prompt]:
        """The prompt of each row of this rank's tree."""
        number = self.rollout.tree.prompt[rows] * self.world.data_size + self.world.data_rank
        return [self.prompts[i % len(self.prompts)] for i in number]

    def micro_batches(self, rows: Ints, size: int) -> list[MicroBatch]:
        """The rows of the whole tree among `rows` that belong to this rank, `size` at a time.

        Every rank gets the same number of micro-batches, because a forward pass of sharded
        parameters needs all ranks. A rank with too few rows repeats a row that does not count.
        """
        mine = self.local_rows(rows)
        batches = [MicroBatch(mine[i : i + size], True) for i in range(0, len(mine), size)]
        spare = (
            mine[:1] if len(mine) else np.array([rows[0] % self._rows_per_prompt], dtype=np.int64)
        )
        missing = -(-self._most_rows(rows) // size) - len(batches)
        return batches + [MicroBatch(spare, False)] * missing

    def _most_rows(self, rows: Ints) -> int:
        """The largest number of rows among `rows` that belong to the same rank."""
        rank = rows // self._rows_per_prompt % self.world.data_size
        return int(np.bincount(rank, minlength=1).max(initial=0))
