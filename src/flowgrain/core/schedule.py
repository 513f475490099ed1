"""Evaluation order of a tree: batches of rows, and a storage slot for each latent.

Shapes: N rows of the tree, B rows of a batch, K children.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flowgrain.core.tree import ROOT, Ints, Tree

TailSchedule = Literal["interleaved", "last", "aligned"]
"""When tail rows are evaluated.

"interleaved": together with other rows. "last": after all other rows. "aligned": after all other
rows, and every chain of steps keeps its batch position from its first to its last step.
"""


@dataclass(frozen=True)
class Batch:
    """One model call: the rows it evaluates and the children it produces.

    Attributes:
        rows: [B] rows to evaluate.
        slot: [B] slots of their latents.
        child: [K] rows to produce.
        child_of: [K] position in `rows` of each child's parent.
        tail: whether the rows are tail rows that are scheduled separately.
        continues: whether each row is the child of the row at the same position in the previous
            batch.
    """

    rows: Ints
    slot: Ints
    child: Ints
    child_of: Ints
    tail: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Schedule:
    """The batches of a tree, and where each latent is stored.

    Attributes:
        batches: model calls in order.
        slot: [N] slot of each row's latent.
        num_slots: largest number of latents held at once.
        x0_slot: [N] slot of the parent's x0 estimate, -1 for rows that do not store it.
        num_x0_slots: largest number of stored x0 estimates.
    """

    batches: tuple[Batch, ...]
    slot: Ints
    num_slots: int
    x0_slot: Ints
    num_x0_slots: int


class _Slots:
    """Numbered storage. The lowest free slot is used first."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.count = 0

    def acquire(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.count += 1
        return self.count - 1

    def release(self, slot: int) -> None:
        heapq.heappush(self.free, slot)


@lru_cache(maxsize=4)
def schedule(tree: Tree, batch_size: int, tail_schedule: TailSchedule = "interleaved") -> Schedule:
    """Divide `tree` into the fewest batches of `batch_size` rows, and assign a slot per latent.

    All ready rows can share a batch, also rows with different noise levels. Rows with the most
    remaining steps come first, which is optimal for trees (Hu 1961). A slot is reused as soon as
    the children of its row exist, unless the update or the decoder needs the latent.
    """
    n = len(tree)
    children_of = _children(tree)
    height = np.zeros(n, dtype=np.int64)
    for row in range(n - 1, -1, -1):
        if tree.parent[row] != ROOT:
            height[tree.parent[row]] = max(height[tree.parent[row]], height[row] + 1)
    separate = tree.tail & (height > 0) & (tail_schedule != "interleaved")
    main = (height > 0) & ~separate
    order = [
        (rows, False, False) for rows in _highest_first(tree, children_of, height, main, batch_size)
    ]
    if tail_schedule == "aligned":
        aligned = _aligned(tree, children_of, height, separate, batch_size)
        order += [(rows, True, continues) for rows, continues in aligned]
    else:
        last = _highest_first(tree, children_of, height, separate, batch_size)
        order += [(rows, True, False) for rows in last]
    return _assign_slots(tree, children_of, order)


def _children(tree: Tree) -> list[Ints]:
    """The children of every row."""
    n = len(tree)
    has_parent = np.flatnonzero(tree.parent != ROOT)
    order = has_parent[np.argsort(tree.parent[has_parent], kind="stable")]
    first = np.searchsorted(tree.parent[order], np.arange(n + 1))
    return [order[first[row] : first[row + 1]] for row in range(n)]


def _assign_slots(
    tree: Tree, children_of: Sequence[Ints], order: Sequence[tuple[Ints, bool, bool]]
) -> Schedule:
    """The schedule that evaluates the entries (rows, tail, continues) of `order` in sequence."""
    n = len(tree)
    kept = tree.kept.copy()
    kept[tree.leaves] = kept[tree.edges] = kept[tree.trained_parents] = True
    stores_x0 = np.zeros(n, dtype=bool)
    stores_x0[tree.multistep_parents] = True
    slot, x0_slot = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    slots, x0_slots = _Slots(), _Slots()
    for row in np.flatnonzero(tree.parent == ROOT).tolist():
        slot[row] = slots.acquire()
    batches = []
    for rows, tail, continues in order:
        for row in rows:
            if not kept[row]:
                slots.release(int(slot[row]))
        children = [children_of[row] for row in rows]
        child = np.concatenate(children)
        for row in child.tolist():
            slot[row] = slots.acquire()
            if stores_x0[row]:
                x0_slot[row] = x0_slots.acquire()
        for row in rows[stores_x0[rows]]:  # after the children, which must not overwrite it
            x0_slots.release(int(x0_slot[row]))
        child_of = np.repeat(np.arange(len(rows)), [len(c) for c in children])
        batches.append(Batch(rows, slot[rows], child, child_of, tail, continues))
    return Schedule(tuple(batches), slot, slots.count, x0_slot, x0_slots.count)


def _first_rows(tree: Tree, among: NDArray[np.bool_]) -> list[int]:
    """The rows of `among` whose parent is not in `among`."""
    rows = np.flatnonzero(among).tolist()
    return [row for row in rows if tree.parent[row] == ROOT or not among[tree.parent[row]]]


def _highest_first(
    tree: Tree,
    children_of: Sequence[Ints],
    height: Ints,
    among: NDArray[np.bool_],
    batch_size: int,
) -> Iterator[Ints]:
    """Batches of the rows `among` as they become ready. Rows with the largest height come first."""
    ready = [(-int(height[row]), row) for row in _first_rows(tree, among)]
    heapq.heapify(ready)
    while ready:
        rows = np.array([heapq.heappop(ready)[1] for _ in range(min(batch_size, len(ready)))])
        for row in np.concatenate([children_of[row] for row in rows]).tolist():
            if among[row]:
                heapq.heappush(ready, (-int(height[row]), int(row)))
        yield rows


def _aligned(
    tree: Tree,
    children_of: Sequence[Ints],
    height: Ints,
    among: NDArray[np.bool_],
    batch_size: int,
) -> Iterator[tuple[Ints, bool]]:
    """Batches of the rows `among` by chain, and whether each batch continues the previous batch.

    A chain continues with the child of the largest height. Every other child starts a new chain,
    which is evaluated later.
    """
    chains: dict[tuple[int, tuple[int, ...]], list[list[int]]] = {}
    starts = [(0, row) for row in _first_rows(tree, among)]
    while starts:
        generation, row = starts.pop()
        chain = [row]
        while below := [child for child in children_of[chain[-1]].tolist() if among[child]]:
            highest = max(below, key=lambda child: (height[child], -child))
            starts += [(generation + 1, child) for child in below if child != highest]
            chain.append(highest)
        key = (generation, tuple(tree.grid_index[chain].tolist()))
        chains.setdefault(key, []).append(chain)
    for key in sorted(chains):
        same_indices = np.array(sorted(chains[key]))
        for i in range(0, len(same_indices), batch_size):
            for place, rows in enumerate(same_indices[i : i + batch_size].T):
                yield rows, place > 0
