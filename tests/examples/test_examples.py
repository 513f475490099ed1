"""The examples run."""

from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path, tmp_path, monkeypatch, capsys):
    """With one training step in place of ten, and with two evaluations."""
    text = path.read_text(encoding="utf-8")
    assert "STEPS = 10\n" in text
    monkeypatch.chdir(tmp_path)
    exec(compile(text.replace("STEPS = 10\n", "STEPS = 1\n"), str(path), "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 2
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "groups" / "step-000001.zip").exists()


def test_there_are_examples():
    assert [path.stem for path in EXAMPLES] == ["demo", "own_reward", "read_run"]
