"""What a training step holds between its rollout and its update."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flowgrain.models import Conditioning
from flowgrain.distributed.mesh import Group
from flowgrain.rewards import Scores
from flowgrain.core.rollout import Rollout
from flowgrain.core.tree import Ints, Tree

Metrics = dict[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class Sampled:
    """What a step has before its update.

    whole is the tree of all prompts, its structure alone; scores [I], credited, advantage and weight [E] are of it, the same in
    every process. credited: the trained edges, or the leaves where a method trains on images. result, images and cond are
    of the prompts that were dealt to this process, every `group.size`-th.
    """

    step: int
    prompts: list[str]
    whole: Tree
    group: Group
    cond: Conditioning
    result: Rollout
    images: Tensor
    scores: dict[str, Scores]
    credited: Ints
    advantage: Tensor
    weight: Tensor

    @property
    def _rows(self) -> int:
        return len(self.whole) // self.whole.num_prompts

    def here(self, rows: Ints) -> Ints:
        """Of the rows `rows` of the whole tree those that this process has, as rows of its own tree."""
        prompt, offset = np.divmod(rows, self._rows)
        mine = prompt % self.group.size == self.group.rank
        return (prompt[mine] // self.group.size) * self._rows + offset[mine]

    def there(self, rows: Ints) -> Ints:
        """Rows of this process's tree as rows of the whole one."""
        prompt, offset = np.divmod(rows, self._rows)
        return (prompt * self.group.size + self.group.rank) * self._rows + offset

    def most(self, rows: Ints) -> int:
        """How many of the rows `rows` of the whole tree the process has that has the most of them."""
        return int(np.bincount(rows // self._rows % self.group.size, minlength=1).max(initial=0))

    def passes(self, rows: Ints, size: int) -> list[tuple[Ints, bool]]:
        """This process's passes over `rows` of the whole tree, `size` of its own rows at a time, and whether a pass counts.

        All processes make as many, since each takes all of them through the sharded weights: one that has too few rows repeats a
        row that counts for nothing.
        """
        mine = self.here(rows)
        own = [(mine[i : i + size], True) for i in range(0, len(mine), size)]
        stand_in = mine[:1] if len(mine) else np.array([rows[0] % self._rows], dtype=np.int64)
        return own + [(stand_in, False)] * (-(-self.most(rows) // size) - len(own))
