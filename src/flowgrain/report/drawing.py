"""The tree of one prompt as text, for a terminal."""

from collections import defaultdict
from typing import NamedTuple

from rich.markup import escape
from rich.tree import Tree as Drawing

from flowgrain.config.schema import Config
from flowgrain.core.tree import ROOT, Tree


class _Subtree(NamedTuple):
    """A row and everything below it. Equal subtrees are drawn once, with their number."""

    grid_index: int
    stochastic: bool
    trained: bool
    image: bool
    below: tuple["_Subtree", ...]

    @property
    def size(self) -> int:
        return 1 + sum(child.size for child in self.below)


def draw_tree(tree: Tree, config: Config) -> Drawing:
    """`tree` of one prompt. Equal branches are drawn once with their number.

    Consecutive ODE steps are joined to one line of grid indices, such as 0-1-2-3#.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for row, parent in enumerate(tree.parent):
        children[int(parent)].append(row)
    images = set(tree.leaves.tolist())
    subtrees: dict[int, _Subtree] = {}
    for row in range(len(tree) - 1, -1, -1):
        subtrees[row] = _Subtree(
            grid_index=int(tree.grid_index[row]),
            stochastic=bool(tree.stochastic[row]),
            trained=bool(tree.trained[row]),
            image=row in images,
            below=tuple(sorted(subtrees[child] for child in children[row])),
        )
    method = config.method
    title = escape(method.title or method.name)
    drawing = Drawing(
        f"[bold]{title}[/], {config.sampling.num_steps} sampling steps. "
        "Numbers are grid indices.   ~ stochastic step   - ODE step   # image"
    )
    for root, count in _counted([subtrees[row] for row in children[ROOT]]):
        node = drawing.add(f"initial noise{_times(count)}")
        _add(node, root, "0", config.sigmas().tolist() if config.grid_is_known else None)
    return drawing


def _counted(subtrees: list[_Subtree]) -> list[tuple[_Subtree, int]]:
    """Distinct subtrees with their number, in order of first appearance."""
    number: dict[_Subtree, int] = {}
    for subtree in subtrees:
        number[subtree] = number.get(subtree, 0) + 1
    return list(number.items())


def _times(count: int) -> str:
    return f" x{count}" if count > 1 else ""


def _add(drawing: Drawing, subtree: _Subtree, line: str, sigmas: list[float] | None) -> None:
    """Draw a subtree. Its longest ODE continuation, or its only child, extends `line`."""
    while True:
        if not subtree.below:
            drawing.add(line + ("#" if subtree.image else ""))
            return
        odes = [child for child in subtree.below if not child.stochastic]
        next_row = max(odes, key=lambda child: child.size, default=None)
        branches = list(subtree.below)
        if next_row is not None:
            branches.remove(next_row)
        elif len(branches) == 1:
            next_row = branches.pop()
        for branch, count in _counted(branches):
            node = drawing.add(_label(branch, subtree.grid_index, count, sigmas))
            _add(node, branch, str(branch.grid_index), sigmas)
        if next_row is None:
            if "-" in line or "~" in line:
                drawing.add(line)
            return
        line += ("~" if next_row.stochastic else "-") + str(next_row.grid_index)
        subtree = next_row


def _label(branch: _Subtree, start: int, count: int, sigmas: list[float] | None) -> str:
    mark = "~" if branch.stochastic else "-"
    kind = "trained" if branch.trained else "not trained"
    suffix = f" [green]{kind}[/]" if branch.stochastic else ""
    level = f" (sigma {sigmas[start]:.3f})" if sigmas else ""
    return f"at {start}{level} {mark}{_times(count)}{suffix}"
