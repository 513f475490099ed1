"""The README shows the real code and the real numbers."""

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_plan_is_the_one_in_the_package() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shown = next(block for block in blocks if block.startswith("def plan"))
    source = (ROOT / "src" / "flowgrain" / "methods" / "g2rpo.py").read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    plan = next(node for node in functions if node.name == "plan")
    assert ast.dump(ast.parse(shown)) == ast.dump(
        ast.parse(textwrap.dedent(ast.get_source_segment(source, plan, padded=True)))
    )


def test_the_numbers_are_those_of_the_figure() -> None:
    numbers = json.loads((ROOT / "docs" / "images" / "demo.json").read_text())
    caption = re.search(r"\*The demo on.*?\*", README, re.DOTALL)[0]
    for value in (numbers["before"], numbers["after"], *numbers["difference"]):
        assert f"{value:.3f}" in caption
    assert f"{numbers['prompts']} held-out prompts" in caption


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
