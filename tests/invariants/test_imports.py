"""Imports point down."""

import ast
from pathlib import Path

import flowgrain

ORDER = [
    "process", "published", "shapes", "sde", "tree", "parallel", "rollout", "credit", "objective", "settings", "window",
    "algorithms", "calibrate", "backbones", "rewards", "checkpoint", "tails", "policy", "prompts", "evaluate", "record", "recipes",
    "sampled", "forward", "train", "survey", "simulate", "fidelity", "comparisons", "compare", "doctor", "report", "cli",
    "__main__",
]  # fmt: skip
ROOT = Path(flowgrain.__file__).parent
LATE = {("train", "report"), ("cli", "report"), ("compare", "comparisons"), ("backbones", "shapes"), ("rewards", "shapes")}


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_down():
    wrong = []
    for path in ROOT.rglob("*.py"):
        above = module_of(path)
        if above == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flowgrain"):
                names = [node.module] if node.module != "flowgrain" else [f"flowgrain.{a.name}" for a in node.names]
            for name in names:
                below = name.split(".")[1]
                if below != above and (above, below) not in LATE and ORDER.index(below) >= ORDER.index(above):
                    wrong.append(f"{path.name}: {above} imports {below}")
    assert not wrong


def test_one_file_knows_of_other_processes():
    assert [path.name for path in ROOT.rglob("*.py") if "torch.distributed" in path.read_text()] == ["parallel.py"]


def test_the_core_knows_no_model_and_no_process_group():
    for name in ("sde", "tree", "rollout", "credit", "objective", "algorithms"):
        text = (ROOT / f"{name}.py").read_text()
        assert "diffusers" not in text
        assert "distributed" not in text
