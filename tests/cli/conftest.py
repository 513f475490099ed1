"""A directory of their own for all commands, and a trained run for those that read one."""

import pytest
from command_line import SMALL, succeeded


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Every command runs in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a demo of two steps."""
    folder = tmp_path_factory.mktemp("command") / "run"
    output = succeeded("train", *SMALL, "evaluation.every=1", "--out", folder)
    assert "Held-out oracle" in output
    assert f"open {folder / 'report.html'}" in output
    return folder
