"""The tree of one prompt as text: what `flowgrain plan` shows."""

from collections import defaultdict

from rich.tree import Tree as Drawing

from flowgrain.config.schema import Settings
from flowgrain.core.tree import ROOT, Tree

Shape = tuple[int, bool, bool, bool, tuple["Shape", ...]]  # level, stochastic, trained, image, children


def draw_tree(tree: Tree, s: Settings) -> Drawing:
    """`tree` of one prompt for a terminal: equal branches are drawn once with their number, ODE steps are joined to lines."""
    children: dict[int, list[int]] = defaultdict(list)
    for row, parent in enumerate(tree.parent):
        children[int(parent)].append(row)
    images = set(tree.leaves.tolist())
    shapes: dict[int, Shape] = {}
    for row in range(len(tree) - 1, -1, -1):
        below = tuple(sorted(shapes[child] for child in children[row]))
        shapes[row] = (int(tree.level[row]), bool(tree.stochastic[row]), bool(tree.trained[row]), row in images, below)
    sigmas = s.grid()
    drawing = Drawing(f"[bold]{s.method}[/]  T={s.num_steps}   ~ noise   - ODE   # image   (grid index of every state)")
    roots = [shapes[row] for row in children[ROOT]]
    for shape, number in _count(roots):
        _add(drawing.add(f"initial noise{_times(number)}"), shape, "0", sigmas.tolist())
    return drawing


def _count(shapes: list[Shape]) -> list[tuple[Shape, int]]:
    """Distinct shapes with their number, in order of first appearance."""
    number: dict[Shape, int] = {}
    for shape in shapes:
        number[shape] = number.get(shape, 0) + 1
    return list(number.items())


def _times(number: int) -> str:
    return f" x{number}" if number > 1 else ""


def _add(drawing: Drawing, shape: Shape, line: str, sigmas: list[float]) -> None:
    """Writes the subtree: its longest ODE or only continuation goes on along `line`, everything else hangs below."""
    while True:
        level, *_, image, below = shape
        if not below:
            drawing.add(line + ("#" if image else ""))
            return
        going_on = max((child for child in below if not child[1]), key=_size, default=None)
        branches = list(below)
        if going_on is not None:
            branches.remove(going_on)
        elif len(below) == 1:
            going_on, branches = below[0], []
        for branch, number in _count(branches):
            kind = "trained" if branch[2] else "not trained"
            mark = "~" if branch[1] else "-"
            label = f"at {level} (sigma {sigmas[level]:.3f}) {mark}{_times(number)}" + (f" [green]{kind}[/]" if branch[1] else "")
            _add(drawing.add(label), branch, str(branch[0]), sigmas)
        if going_on is None:
            if "-" in line or "~" in line:
                drawing.add(line)
            return
        line += ("~" if going_on[1] else "-") + str(going_on[0])
        shape = going_on


def _size(shape: Shape) -> int:
    return 1 + sum(map(_size, shape[-1]))
