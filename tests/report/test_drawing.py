"""The tree as text."""

from rich.console import Console

from flowgrain import load_config
from flowgrain.report.drawing import draw_tree


def drawn(method, **options):
    config = load_config(method, {f"method.{name}": value for name, value in options.items()})
    config = config.with_changes({"sampling.num_steps": 4})
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(draw_tree(config.tree(), config))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_equal_branches_are_drawn_once():
    lines = drawn("g2rpo", group_size=3, granularities=[1, 2], sde_steps=[1])
    assert lines[0].startswith("G2RPO, 4 sampling steps. Numbers are grid indices.")
    assert lines[1:] == [
        "└── initial noise",
        "    ├── at 1 (sigma 0.900) ~ x3 trained",
        "    │   ├── at 2 (sigma 0.750) -",
        "    │   │   └── 4#",
        "    │   └── 2-3-4#",
        "    └── 0-1-2-3-4#",
    ]


def test_a_trajectory_is_one_line():
    lines = drawn("flow_grpo", group_size=3)
    assert len(lines) == 3
    assert lines[1] == "└── initial noise x3"
    assert lines[2].endswith("~3-4#")
