"""The tree of a rollout as a table, the verbs that write it, its schedule and its cost.

A row is a latent, the step that reached it and, at sigma = 0, an image. The table is structure alone: it is known, priced
and drawn before anything runs. Letters: P prompts, N rows, E trained edges, T steps, I images, C channels.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
CoarseGrid = Literal["stride", "exact"]
Tails = Literal["mixed", "last", "in_company"]

ROOT = -1


def coarse_levels(start: int, num_steps: int, stride: int = 1, grid: CoarseGrid = "stride") -> list[int]:
    """Grid indices from `start` to T that an ODE of granularity `stride` visits, both ends included.

    The first step is always fine, the last goes straight to T. `stride` is the reading of G2RPO's public code: the last
    level short of T that the stride meets is dropped. `exact` keeps it (G2RPO eq. 10 to the letter).
    """
    visited = [start, *range(start + 1, num_steps + 1, stride)]
    if grid == "stride" or visited[-1] == num_steps:
        visited = visited[:-1]
    return [*visited, num_steps] if start < num_steps else [start]


@dataclass(frozen=True, eq=False)
class Tree:
    """The table: N rows in an order in which parents come first.

    parent [N] row index or ROOT; level [N] grid index reached, 0..T; stochastic, trained [N]; prompt [N] in 0..P-1;
    multistep [N] a deterministic row reached by a step of second order, which also looks at its grandparent;
    draw [N] which noise of its prompt a root or a stochastic row takes, -1 for ODE rows;
    image [J] and channel [J]: row `image[j]` is decoded and its reward counts in channel `channel[j]` (a granularity, say);
    a row may stand in several channels and is decoded once.
    """

    num_steps: int
    num_prompts: int
    parent: Ints
    level: Ints
    stochastic: NDArray[np.bool_]
    trained: NDArray[np.bool_]
    multistep: NDArray[np.bool_]
    prompt: Ints
    draw: Ints
    image: Ints
    channel: Ints

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def _key(self) -> tuple[int, bytes]:
        columns = (self.parent, self.level, self.trained, self.multistep, self.prompt, self.draw, self.image, self.channel)
        return self.num_steps, b"".join(column.tobytes() for column in columns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def edges(self) -> Ints:
        """Rows [E] reached by a stochastic step that is trained; an edge is named by the row it leads to."""
        return np.flatnonzero(self.trained)

    @cached_property
    def trained_parents(self) -> Ints:
        """Distinct rows from which trained edges leave: one gradient forward each."""
        return np.unique(self.parent[self.edges])

    @cached_property
    def evaluated(self) -> Ints:
        """Rows whose velocity is needed, those with children: one forward pass each."""
        return np.unique(self.parent[self.parent != ROOT])

    @cached_property
    def leaves(self) -> Ints:
        """Distinct rows that are decoded and scored, [I]."""
        return np.unique(self.image)

    @cached_property
    def peers(self) -> Ints:
        """Group number [E] of every trained edge: the edges of one prompt at one step are compared with each other."""
        edges = self.edges
        return np.unique(self.prompt[edges] * (self.num_steps + 1) + self.level[edges], return_inverse=True)[1]

    @cached_property
    def remembering(self) -> Ints:
        """Rows that keep their parent's x0_hat beside their latent, because a multistep child will want it."""
        return np.unique(self.parent[self.multistep])

    @cached_property
    def tail(self) -> NDArray[np.bool_]:
        """Rows [N] from which no stochastic step descends: how they are finished changes rewards, but no log-probability."""
        noisy_below = np.zeros(len(self), dtype=bool)
        for row in range(len(self) - 1, -1, -1):
            if self.parent[row] != ROOT and (self.stochastic[row] or noisy_below[row]):
                noisy_below[self.parent[row]] = True
        return ~noisy_below

    @property
    def num_channels(self) -> int:
        return int(self.channel.max(initial=-1)) + 1

    def repeat(self, prompts: int) -> "Tree":
        """This tree of one prompt, once for each of `prompts` prompts."""
        n = len(self)
        shift = np.arange(prompts).repeat(n)
        parent = np.tile(self.parent, prompts)
        return Tree(
            num_steps=self.num_steps,
            num_prompts=prompts,
            parent=np.where(parent == ROOT, ROOT, parent + shift * n),
            level=np.tile(self.level, prompts),
            stochastic=np.tile(self.stochastic, prompts),
            trained=np.tile(self.trained, prompts),
            multistep=np.tile(self.multistep, prompts),
            prompt=shift,
            draw=np.tile(self.draw, prompts),
            image=np.tile(self.image, prompts) + np.arange(prompts).repeat(len(self.image)) * n,
            channel=np.tile(self.channel, prompts),
        )


class _Row(NamedTuple):
    parent: int
    level: int
    stochastic: bool = False
    trained: bool = False
    multistep: bool = False
    draw: int = -1


class Planner:
    """Writes the tree of one prompt with three verbs, `root`, `sde` and `ode`, and `image` for what is to be scored."""

    def __init__(self, num_steps: int, coarse_grid: CoarseGrid = "stride") -> None:
        self.num_steps = num_steps
        self.coarse_grid: CoarseGrid = coarse_grid
        self._rows: list[_Row] = []
        self._ode_child: dict[_Row, int] = {}
        self._images: list[tuple[int, int]] = []
        self._draws = 0

    def root(self) -> int:
        """A new initial noise at sigma = 1; returns its row."""
        return self._add(_Row(ROOT, 0, draw=self._draw()))

    def sde(self, node: int, fan: int = 1, train: bool = True) -> list[int]:
        """`fan` stochastic steps of one grid step from `node`, each with its own noise; returns their rows.

        Raises ValueError at sigma = 0, from where no step leads on.
        """
        level = self._rows[node].level + 1
        if level > self.num_steps:
            raise ValueError(f"no stochastic step leads on from sigma = 0 (row {node} stands at level {self.num_steps})")
        return [self._add(_Row(node, level, stochastic=True, trained=train, draw=self._draw())) for _ in range(fan)]

    def ode(self, node: int, to: int | None = None, stride: int = 1, *, via: Sequence[int] | None = None, order: int = 1) -> int:
        """ODE steps from `node` to grid index `to` (default: sigma = 0), coarse by `stride`; returns the last row.

        via names the grid indices to stop at instead, the last among them. order 2 takes multistep steps (see sde.multistep)
        but for one from a root and the one into sigma = 0. Steps that another call has written from the same state are shared.
        Raises ValueError for a stride with `to` short of sigma = 0, or indices that lie behind.
        """
        level = self._rows[node].level
        to = self.num_steps if to is None else to
        if stride < 1 or not level <= to <= self.num_steps or (stride > 1 and to != self.num_steps):
            raise ValueError(f"an ODE from level {level} to {to} of {self.num_steps} by stride {stride} is not possible")
        levels = [level, *via] if via is not None else coarse_levels(level, to, stride, self.coarse_grid)
        if any(b <= a for a, b in itertools.pairwise(levels)) or levels[-1] > self.num_steps:
            raise ValueError(f"an ODE from level {level} of {self.num_steps} by way of {list(via or ())} is not possible")
        for following in levels[1:]:
            multistep = order == 2 and following < self.num_steps and self._rows[node].parent != ROOT
            row = _Row(node, following, multistep=multistep)
            node = self._ode_child[row] if row in self._ode_child else self._add(row)
            self._ode_child[row] = node
        return node

    def image(self, node: int, channel: int = 0) -> None:
        """Ask for the image of `node`, its reward to count in `channel`. Raises ValueError short of sigma = 0."""
        if self._rows[node].level != self.num_steps:
            raise ValueError(f"row {node} stands at level {self._rows[node].level}, short of sigma = 0, and is no image")
        if (node, channel) not in self._images:
            self._images.append((node, channel))

    def tree(self) -> Tree:
        """The table, without the rows that lead to no image. Raises ValueError if nothing is left to train or score."""
        needed = np.zeros(len(self._rows), dtype=bool)
        needed[[node for node, _ in self._images]] = True
        for row in range(len(self._rows) - 1, -1, -1):
            if needed[row] and self._rows[row].parent != ROOT:
                needed[self._rows[row].parent] = True
        kept = np.flatnonzero(needed)
        if not kept.size:
            raise ValueError("the plan asks for no image")
        number = np.cumsum(needed) - 1
        columns = zip(*(self._rows[row] for row in kept), strict=True)
        parent, level, stochastic, trained, multistep, draw = (np.array(column) for column in columns)
        image, channel = np.array(self._images, dtype=np.int64).T
        return Tree(
            num_steps=self.num_steps,
            num_prompts=1,
            parent=np.where(parent == ROOT, ROOT, number[parent]).astype(np.int64),
            level=level.astype(np.int64),
            stochastic=stochastic.astype(bool),
            trained=trained.astype(bool),
            multistep=multistep.astype(bool),
            prompt=np.zeros(len(kept), dtype=np.int64),
            draw=draw.astype(np.int64),
            image=number[image].astype(np.int64),
            channel=channel.copy(),
        )

    def _add(self, row: _Row) -> int:
        self._rows.append(row)
        return len(self._rows) - 1

    def _draw(self) -> int:
        self._draws += 1
        return self._draws - 1


@dataclass(frozen=True)
class Pass:
    """One batch of the model: which rows it evaluates and which children it makes.

    rows, slot [B]; child [K] rows with child_of [K], the position of its parent in `rows`. In a schedule whose tails stand apart,
    tail: whether these rows are of tails, and follows: whether each is the child of the row at its place in the pass before.
    """

    rows: Ints
    slot: Ints
    child: Ints
    child_of: Ints
    tail: bool = False
    follows: bool = False


@dataclass(frozen=True)
class Schedule:
    """The passes of a tree, and where each latent lives: slot [N], num_slots the peak number of latents held at once.

    memory [N] is where a row keeps its parent's x0_hat, -1 for the rows that need not; num_memories as num_slots.
    """

    passes: tuple[Pass, ...]
    slot: Ints
    num_slots: int
    memory: Ints
    num_memories: int


class _Slots:
    """Places that are taken and given back; the lowest free one goes first."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.count = 0

    def take(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.count += 1
        return self.count - 1

    def give(self, place: int) -> None:
        heapq.heappush(self.free, place)


@lru_cache(maxsize=4)
def schedule(tree: Tree, rows_per_pass: int, tails: Tails = "mixed") -> Schedule:
    """Orders the evaluations into batches of `rows_per_pass` rows, as few as possible, and gives every latent a slot.

    All ready rows compete whatever their noise level; those with the longest way to go first (highest level first is
    optimal for trees: Hu 1961). tails: "last" puts them after everything else, "in_company" also keeps each chain of steps with
    the same companions from its first to its last, for what is kept from one step of a row to the next (feature caching).
    A latent's slot is free again once its children exist, unless the update or the decoder still wants it.
    """
    n = len(tree)
    has_parent = np.flatnonzero(tree.parent != ROOT)
    order = has_parent[np.argsort(tree.parent[has_parent], kind="stable")]
    first = np.searchsorted(tree.parent[order], np.arange(n + 1))
    children_of = [order[first[row] : first[row + 1]] for row in range(n)]
    height = np.zeros(n, dtype=np.int64)
    for row in range(n - 1, -1, -1):
        if tree.parent[row] != ROOT:
            height[tree.parent[row]] = max(height[tree.parent[row]], height[row] + 1)
    apart = tree.tail & (height > 0) & (tails != "mixed")
    batches = [(rows, False, False) for rows in _highest_first(tree, children_of, height, (height > 0) & ~apart, rows_per_pass)]
    if tails == "in_company":
        batches += [(rows, True, follows) for rows, follows in _in_company(tree, children_of, height, apart, rows_per_pass)]
    else:
        batches += [(rows, True, False) for rows in _highest_first(tree, children_of, height, apart, rows_per_pass)]

    kept = np.zeros(n, dtype=bool)
    kept[tree.leaves] = kept[tree.edges] = kept[tree.trained_parents] = True
    remembers = np.zeros(n, dtype=bool)
    remembers[tree.remembering] = True
    slot, memory = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    slots, memories = _Slots(), _Slots()
    for row in np.flatnonzero(tree.parent == ROOT).tolist():
        slot[row] = slots.take()
    passes = []
    for rows, tail, follows in batches:
        for row in rows:
            if not kept[row]:
                slots.give(int(slot[row]))
        children = [children_of[row] for row in rows]
        child = np.concatenate(children)
        for row in child.tolist():
            slot[row] = slots.take()
            if remembers[row]:
                memory[row] = memories.take()
        for row in rows[remembers[rows]]:  # only now: a child's memory must not overwrite what its parent still reads
            memories.give(int(memory[row]))
        child_of = np.repeat(np.arange(len(rows)), [len(c) for c in children])
        passes.append(Pass(rows, slot[rows], child, child_of, tail, follows))
    return Schedule(tuple(passes), slot, slots.count, memory, memories.count)


def _begin(tree: Tree, among: NDArray[np.bool_]) -> list[int]:
    """The rows of `among` whose parent is none of them."""
    return [int(row) for row in np.flatnonzero(among) if tree.parent[row] == ROOT or not among[tree.parent[row]]]


def _highest_first(
    tree: Tree, children_of: Sequence[Ints], height: Ints, among: NDArray[np.bool_], rows_per_pass: int
) -> Iterator[Ints]:
    """Batches of the rows `among`, whichever are ready, the highest first."""
    ready = [(-int(height[row]), row) for row in _begin(tree, among)]
    heapq.heapify(ready)
    while ready:
        rows = np.array([heapq.heappop(ready)[1] for _ in range(min(rows_per_pass, len(ready)))])
        for row in np.concatenate([children_of[row] for row in rows]).tolist():
            if among[row]:
                heapq.heappush(ready, (-int(height[row]), int(row)))
        yield rows


def _in_company(
    tree: Tree, children_of: Sequence[Ints], height: Ints, apart: NDArray[np.bool_], rows_per_pass: int
) -> Iterator[tuple[Ints, bool]]:
    """Batches of the rows `apart`, chain by chain, and whether each continues the batch before it.

    A row's chain goes on with its highest child; another child begins one of its own, which waits for the first to be done.
    """
    chains: dict[tuple[int, tuple[int, ...]], list[list[int]]] = {}
    begins = [(0, row) for row in _begin(tree, apart)]
    while begins:
        after, row = begins.pop()
        chain = [row]
        while following := [child for child in children_of[chain[-1]].tolist() if apart[child]]:
            heir = max(following, key=lambda child: (height[child], -child))
            begins += [(after + 1, child) for child in following if child != heir]
            chain.append(heir)
        chains.setdefault((after, tuple(tree.level[chain].tolist())), []).append(chain)
    for key in sorted(chains):
        alike = np.array(sorted(chains[key]))
        for i in range(0, len(alike), rows_per_pass):
            for place, rows in enumerate(alike[i : i + rows_per_pass].T):
                yield rows, place > 0


@dataclass(frozen=True)
class Cost:
    """What a tree costs: rows through the model while sampling and while training, decodes, reward calls, edges trained.

    frozen_forward_passes are those of the update that take no gradient: the old policy's for every update of a rollout but
    the first, and the reference's. A tree alone does not tell them; see algorithms.price.
    """

    forward_passes: int
    train_forward_passes: int
    decodes: int
    reward_calls: int
    trained_edges: int
    frozen_forward_passes: float = 0

    @property
    def passes(self) -> float:
        """All forward passes, those with gradient three times: forward and backward."""
        return self.forward_passes + 3 * self.train_forward_passes + self.frozen_forward_passes

    @property
    def units(self) -> float:
        """One number to compare methods by: passes + decodes + reward calls."""
        return self.passes + self.decodes + self.reward_calls


def cost(tree: Tree, num_rewards: int = 1) -> Cost:
    """The price of `tree`, by counting. One forward pass is one row through the model (two with true CFG)."""
    return Cost(
        forward_passes=len(tree.evaluated),
        train_forward_passes=len(tree.trained_parents),
        decodes=len(tree.leaves),
        reward_calls=len(tree.leaves) * num_rewards,
        trained_edges=len(tree.edges),
    )


def split_updates(tree: Tree, updates: int | str) -> list[Ints]:
    """The trained parents of `tree`, dealt to the optimizer steps of a rollout: "per_step", or in equal shares of prompts."""
    parents = tree.trained_parents
    if updates == "per_step":
        levels = tree.level[parents]
        return [parents[levels == level] for level in np.unique(levels)]
    groups = np.array_split(np.unique(tree.prompt[parents]), int(updates))
    if any(len(group) == 0 for group in groups):  # fewer prompts than updates
        return [part for part in np.array_split(parents, int(updates)) if len(part)]
    return [parents[np.isin(tree.prompt[parents], group)] for group in groups]
