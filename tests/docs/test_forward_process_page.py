"""The page about forward-process methods shows the real code and the real defaults."""

import json
import re
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowgrain.cli.main import app
from flowgrain.config import load_config
from flowgrain.methods import METHODS, ForwardProcess, Repair, price

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "methods"
PAGE = (PAGES / "forward_process.md").read_text()
SOURCES = ROOT / "src" / "flowgrain" / "methods"
FAMILY = sorted(
    name
    for name in METHODS
    if issubclass(METHODS.get(name), ForwardProcess)
    and not issubclass(METHODS.get(name), Repair)  # it trains at a state of the rollout
    and METHODS.get(name).__module__.startswith("flowgrain.")
)
ROWS = {
    cells[0]: cells
    for cells in re.findall(r"^\| \[`(\w+)`\]\(\w+\.md\) \|(.*)\|$", PAGE, re.MULTILINE)
    for cells in [[cells[0], *(cell.strip() for cell in cells[1].split(" | "))]]
}
BLOCKS = re.findall(r'```python title="(\w+)\.py"\n(.*?)```', PAGE, re.DOTALL)


def test_every_method_of_the_family_is_in_the_table_and_has_a_block() -> None:
    assert sorted(ROWS) == FAMILY
    assert sorted(name for name, _ in BLOCKS) == FAMILY
    assert {len(cells) for cells in ROWS.values()} == {9}


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_the_blocks_are_the_code_of_the_methods(name: str, block: str) -> None:
    source = (SOURCES / f"{name}.py").read_text()
    assert textwrap.indent(block, "    ") in source


@pytest.mark.parametrize("name", FAMILY)
def test_the_row_of_a_method_states_its_defaults(name: str) -> None:
    _, _, _, _, anchors, samples, shared, levels, _, passes = [None, *ROWS[name]]
    method = METHODS.get(name)()
    steps = load_config(name, {"optimizer.learning_rate": 1e-4}).sampling.num_steps
    assert ("old" in anchors) == method.needs_old
    assert ("reference" in anchors) == method.needs_reference
    assert samples == ("old" if method.old_samples else "trained")
    assert shared == ("yes" if method.shares_draws else "no")
    assert levels.startswith(str(method.num_levels(steps)))
    cost = price(method, steps)
    counts = (cost.forward_passes, cost.train_forward_passes, int(cost.frozen_forward_passes))
    assert passes == " / ".join(str(count // method.group_size) for count in counts)


@pytest.mark.parametrize("name", FAMILY)
def test_the_cost_table_of_a_method_states_its_passes(name: str) -> None:
    """Every row: the settings in its first cell, and the counts in the others."""
    text = (PAGES / f"{name}.md").read_text()
    rows = re.findall(rf"^\| `({name}[^`]*)` \| (\d+) \| (\d+) \| (\d+)", text, re.MULTILINE)
    assert rows
    for command, *expected in rows:
        changes = [*command.split()[1:], "optimizer.learning_rate=1e-4"]
        config = load_config(name, changes)
        cost = price(config.method, config.sampling.num_steps)
        counts = (cost.forward_passes, cost.train_forward_passes, int(cost.frozen_forward_passes))
        assert [str(count) for count in counts] == expected, command


def test_the_new_method_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 15
    (tmp_path / "exp_regression.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS._objects))
    small = ("training.max_steps=2", "training.prompts_per_step=2", "sampling.num_steps=4")
    words = ["train", "exp_regression", "--plugin", "exp_regression.py", "method.draws=2", *small]
    words += ["method.group_size=4", "--out", "run", "evaluation.num_prompts=2"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]  # step 0 is the evaluation before training
    assert all(line["grad_norm"] > 0 for line in lines[1:])
    assert [line["train_forward_passes"] for line in lines[1:]] == [2 * 4 * 2] * 2
