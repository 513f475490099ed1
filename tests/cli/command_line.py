"""The command `flowgrain` in this process, because starting one takes seconds."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest

from flowgrain.cli import main

SMALL = (
    "sampling.num_steps=4",
    "method.group_size=3",
    "training.prompts_per_step=2",
    "training.max_steps=2",
    "evaluation.num_prompts=6",
    "evaluation.num_steps=4",
    "evaluation.every=0",
)
"""Settings of a run of the bundled model that takes about a second."""


class Result(NamedTuple):
    """What a command printed, and its exit status."""

    status: int
    stdout: str
    stderr: str


def flowgrain(*words) -> Result:
    """Run `flowgrain` with these words."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["flowgrain", *map(str, words)])
        patch.setenv("COLUMNS", "120")
        status = 0
        try:
            main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    return Result(status, stdout.getvalue(), stderr.getvalue())


def succeeded(*words) -> str:
    """The output of a command that has to succeed."""
    result = flowgrain(*words)
    assert result.status == 0, result.stderr
    return result.stdout


def refused(*words) -> str:
    """The message of a command that has to end with exit status 2."""
    result = flowgrain(*words)
    assert result.status == 2, (result.status, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result.stderr
