"""The tree of a rollout, stored as a table, and the planner that writes it.

A row is a latent and the step that reached it. At sigma = 0, a row is also an image.
The table contains no latents, so the cost of a tree is known before anything runs.

Shapes: P prompts, N rows, E trained edges, T steps, I images, C channels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
CoarseGrid = Literal["stride", "exact"]

ROOT = -1
MAX_ROWS = 50_000
"""Largest number of rows of one prompt. The published methods have up to about 3,000."""


class TreeTooLarge(ValueError):
    """A plan has more than `MAX_ROWS` rows. The planner stops before they take memory."""


def coarse_indices(
    start: int, num_steps: int, stride: int = 1, grid: CoarseGrid = "stride"
) -> list[int]:
    """Grid indices from `start` to T that an ODE of granularity `stride` visits.

    The first step always has length 1, and the last step always ends at T. "stride" is the grid of
    G2RPO's published code, which drops the last index before T that the stride reaches. "exact"
    keeps this index (G2RPO eq. 10 as printed).
    """
    visited = [start, *range(start + 1, num_steps + 1, stride)]
    if grid == "stride" or visited[-1] == num_steps:
        visited = visited[:-1]
    return [*visited, num_steps] if start < num_steps else [start]


@dataclass(frozen=True, eq=False)
class Tree:
    """A rollout's table of N rows. Parents come before their children.

    Attributes:
        num_steps: T, steps of the sampling grid.
        num_prompts: P.
        parent: [N] row number of the parent, or ROOT.
        grid_index: [N] grid index of the row's noise level, 0 (noise) to T (image).
        stochastic: [N] whether a stochastic step reached the row.
        trained: [N] whether the step that reached the row is trained.
        multistep: [N] whether a second-order ODE step reached the row. Such a step also reads its
            grandparent.
        kept: [N] whether the update needs the latent of the row, in addition to the leaves, the
            trained edges and their parents.
        prompt: [N] prompt number, 0 to P - 1.
        draw: [N] number of the noise sample of a root or a stochastic row. -1 for ODE rows.
        image: [J] rows that are decoded and scored.
        channel: [J] channel in which the reward of `image[j]` counts, such as a granularity. A row
            may appear in several channels, but is decoded only once.
    """

    num_steps: int
    num_prompts: int
    parent: Ints
    grid_index: Ints
    stochastic: NDArray[np.bool_]
    trained: NDArray[np.bool_]
    multistep: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    prompt: Ints
    draw: Ints
    image: Ints
    channel: Ints

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def _key(self) -> tuple[int, bytes]:
        columns = (
            self.parent,
            self.grid_index,
            self.trained,
            self.multistep,
            self.kept,
            self.prompt,
            self.draw,
            self.image,
            self.channel,
        )
        return self.num_steps, b"".join(column.tobytes() for column in columns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def edges(self) -> Ints:
        """Rows [E] that a trained stochastic step reached.

        An edge is identified by the row it leads to.
        """
        return np.flatnonzero(self.trained)

    @cached_property
    def trained_parents(self) -> Ints:
        """Distinct parents of trained edges. Each needs one forward pass with gradient."""
        return np.unique(self.parent[self.edges])

    @cached_property
    def evaluated(self) -> Ints:
        """Rows with children. Each needs one forward pass during sampling."""
        return np.unique(self.parent[self.parent != ROOT])

    @cached_property
    def leaves(self) -> Ints:
        """Distinct rows [I] that are decoded and scored."""
        return np.unique(self.image)

    @cached_property
    def comparison_groups(self) -> Ints:
        """Number of the comparison group [E] of every trained edge.

        Edges of the same prompt at the same grid step are in the same group. A step is identified
        by its first and last grid index.
        """
        edges, size = self.edges, self.num_steps + 1
        start, end = self.grid_index[self.parent[edges]], self.grid_index[edges]
        key = (self.prompt[edges] * size + start) * size + end
        groups: Ints = np.unique(key, return_inverse=True)[1]
        return groups

    @cached_property
    def multistep_parents(self) -> Ints:
        """Rows that store their parent's x0 estimate, because a second-order child reads it."""
        return np.unique(self.parent[self.multistep])

    @cached_property
    def tail(self) -> NDArray[np.bool_]:
        """Whether a row [N] has no stochastic descendant.

        Tail rows affect rewards, but no log-probability.
        """
        stochastic_below = np.zeros(len(self), dtype=bool)
        for row in range(len(self) - 1, -1, -1):
            if self.parent[row] != ROOT and (self.stochastic[row] or stochastic_below[row]):
                stochastic_below[self.parent[row]] = True
        return ~stochastic_below

    @property
    def num_channels(self) -> int:
        """C, the number of channels."""
        return int(self.channel.max(initial=-1)) + 1

    def repeat(self, prompts: int) -> "Tree":
        """The tree of one prompt, copied for `prompts` prompts."""
        n = len(self)
        shift = np.arange(prompts).repeat(n)
        parent = np.tile(self.parent, prompts)
        return Tree(
            num_steps=self.num_steps,
            num_prompts=prompts,
            parent=np.where(parent == ROOT, ROOT, parent + shift * n),
            grid_index=np.tile(self.grid_index, prompts),
            stochastic=np.tile(self.stochastic, prompts),
            trained=np.tile(self.trained, prompts),
            multistep=np.tile(self.multistep, prompts),
            kept=np.tile(self.kept, prompts),
            prompt=shift,
            draw=np.tile(self.draw, prompts),
            image=np.tile(self.image, prompts) + np.arange(prompts).repeat(len(self.image)) * n,
            channel=np.tile(self.channel, prompts),
        )


class _Row(NamedTuple):
    parent: int
    grid_index: int
    stochastic: bool = False
    trained: bool = False
    multistep: bool = False
    draw: int = -1


class Planner:
    """Writes the tree of one prompt.

    `root`, `sde` and `ode` add rows. `image` marks a row to decode and score, `keep` a row whose
    latent the update needs.

    Args:
        num_steps: T, steps of the sampling grid.
        sigmas: [T + 1] noise levels of the grid. Default: evenly spaced.
    """

    def __init__(self, num_steps: int, sigmas: Sequence[float] | None = None) -> None:
        self.num_steps = num_steps
        self.sigmas = sigmas or np.linspace(1, 0, num_steps + 1).tolist()
        self._rows: list[_Row] = []
        self._ode_child: dict[_Row, int] = {}
        self._images: dict[tuple[int, int], None] = {}  # in order, without repeats
        self._kept: set[int] = set()
        self._draws = 0

    def root(self) -> int:
        """Add an initial noise sample at sigma = 1, and return its row."""
        return self._add(_Row(ROOT, 0, draw=self._next_draw()))

    def sde(self, node: int, fan: int = 1, train: bool = True, *, length: int = 1) -> list[int]:
        """Add `fan` stochastic steps from `node`, each with its own noise.

        Args:
            node: row to start from.
            fan: number of steps.
            train: whether the steps are trained.
            length: grid steps that are merged into one stochastic step (E-GRPO).

        Returns:
            The rows of the steps.

        Raises:
            ValueError: `length` is below 1, or leads beyond sigma = 0.
        """
        index = self._rows[node].grid_index + length
        if length < 1 or index > self.num_steps:
            start = self._rows[node].grid_index
            raise ValueError(
                f"row {node} is at grid index {start} of {self.num_steps}, so no stochastic step "
                f"of length {length} can follow it"
            )
        rows = (
            _Row(node, index, stochastic=True, trained=train, draw=self._next_draw())
            for _ in range(fan)
        )
        return [self._add(row) for row in rows]

    def ode(
        self,
        node: int,
        to: int | None = None,
        stride: int = 1,
        *,
        via: Sequence[int] | None = None,
        order: int = 1,
        grid: CoarseGrid = "stride",
    ) -> int:
        """Add ODE steps from `node`.

        Steps that an earlier call added from the same state are shared.

        Args:
            node: row to start from.
            to: grid index to reach. Default: T, which is sigma = 0.
            stride: granularity; 1 visits every grid index.
            via: grid indices to visit, in place of `to` and `stride`.
            order: 2 uses second-order multistep steps (see `sde.multistep`), except from a root and
                into sigma = 0.
            grid: coarse grid of a stride above 1, see `coarse_indices`.

        Returns:
            The last row.

        Raises:
            ValueError: an index is not after `node`, or a stride above 1 does not end at
                sigma = 0.
        """
        start = self._rows[node].grid_index
        to = self.num_steps if to is None else to
        if stride < 1 or not start <= to <= self.num_steps or (stride > 1 and to != self.num_steps):
            raise ValueError(
                f"no ODE leads from index {start} to {to} of {self.num_steps} with stride {stride}"
            )
        indices = [start, *via] if via is not None else coarse_indices(start, to, stride, grid)
        if any(b <= a for a, b in itertools.pairwise(indices)) or indices[-1] > self.num_steps:
            raise ValueError(
                f"no ODE leads from index {start} of {self.num_steps} via {list(via or ())}"
            )
        for index in indices[1:]:
            multistep = order == 2 and index < self.num_steps and self._rows[node].parent != ROOT
            row = _Row(node, index, multistep=multistep)
            node = self._ode_child[row] if row in self._ode_child else self._add(row)
            self._ode_child[row] = node
        return node

    def image(self, node: int, channel: int = 0) -> None:
        """Decode and score `node`. Its reward counts in `channel`.

        Raises:
            ValueError: `node` is not at sigma = 0.
        """
        index = self._rows[node].grid_index
        if index != self.num_steps:
            raise ValueError(f"row {node} is at grid index {index}, not at sigma = 0: not an image")
        self._images[node, channel] = None

    def keep(self, node: int) -> None:
        """Keep the latent of `node` for the update, see `Tree.kept`."""
        self._kept.add(node)

    def tree(self) -> Tree:
        """The finished tree. Rows that lead to no image are left out.

        Raises:
            ValueError: no image was requested.
        """
        needed = np.zeros(len(self._rows), dtype=bool)
        needed[[node for node, _ in self._images]] = True
        for row in range(len(self._rows) - 1, -1, -1):
            if needed[row] and self._rows[row].parent != ROOT:
                needed[self._rows[row].parent] = True
        kept = np.flatnonzero(needed)
        if not kept.size:
            raise ValueError("the plan requests no image")
        number = np.cumsum(needed) - 1
        columns = zip(*(self._rows[row] for row in kept), strict=True)
        parent, index, stochastic, trained, multistep, draw = (np.array(c) for c in columns)
        image, channel = np.array(list(self._images), dtype=np.int64).T
        return Tree(
            num_steps=self.num_steps,
            num_prompts=1,
            parent=np.where(parent == ROOT, ROOT, number[parent]).astype(np.int64),
            grid_index=index.astype(np.int64),
            stochastic=stochastic.astype(bool),
            trained=trained.astype(bool),
            multistep=multistep.astype(bool),
            kept=np.isin(kept, list(self._kept)),
            prompt=np.zeros(len(kept), dtype=np.int64),
            draw=draw.astype(np.int64),
            image=number[image].astype(np.int64),
            channel=channel.copy(),
        )

    def _add(self, row: _Row) -> int:
        if len(self._rows) == MAX_ROWS:
            raise TreeTooLarge(f"the tree of one prompt has more than {MAX_ROWS:,} rows")
        self._rows.append(row)
        return len(self._rows) - 1

    def _next_draw(self) -> int:
        self._draws += 1
        return self._draws - 1
