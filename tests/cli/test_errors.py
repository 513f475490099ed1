"""Errors: one message on stderr, an exit status, no traceback, and nothing written."""

import re
from pathlib import Path

import pytest
import requests
from command_line import SMALL, flowgrain, refused

from flowgrain import SettingsError, Trainer, __version__
from flowgrain.cli.app import writing
from flowgrain.training import Interrupted, RunStopped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # unknown keys
        (["granularity=1"], "Did you mean 'method.granularities'"),
        (["method.granularity=[1]"], "Did you mean 'method.granularities'"),
        (["optimizer.lerning_rate=1"], "Did you mean 'optimizer.learning_rate'"),
        (["flow_grpo", "method.granularities=[1]"], "use method 'g2rpo'"),
        (["rewards=[{name: towers, wait: 1}]"], "wait"),
        # wrong types
        (
            ["sampling.num_steps=many"],
            "sampling.num_steps=many: must be a whole number, such as 40.",
        ),
        (["method.granularities=[1,x]"], "method.granularities"),
        (["training.max_steps=[1]"], "training.max_steps"),
        (["sampling=4"], "sampling=4"),
        # out of range
        (["training.max_steps=0"], "training.max_steps=0"),
        (["method.eta=-1"], "method.eta=-1"),
        (["model.height=4", "model.name=flux"], "model.height=4"),
        # impossible combinations
        (["method.sde_steps=[7]"], "Use 0 to 6"),
        (["flow_grpo", "method.best_of=3"], "method.best_of=3"),
        (["flow_grpo", "sampling.tail_cache=taylorseer:3"], "sampling.tail_cache"),
        # things that do not exist
        (["dmo"], "Did you mean 'demo'"),
        (["demo", "extra"], "'extra' is not an override"),
        (["demo", "method.name=nothing"], "there is no method 'nothing'"),
        (["--plugin", "nothing.py"], "nothing.py: there is no such file"),
        (["--preset", "tow-gpus"], "--preset tow-gpus"),
        (["rewards=[nothing]"], "there is no reward 'nothing'"),
        (["data.prompts=nothing.txt"], "data.prompts=nothing.txt"),
        (["model.name=nothing", "rewards=[oracle]"], "model.name=nothing"),
        (["model.name=flux", "model.path=nothing", "rewards=[oracle]"], "model.path=nothing"),
    ],
)
def test_settings_that_cannot_be_used(directory, words, message):
    sources = [word for word in words if "=" not in word]
    source = [] if sources and not sources[0].startswith("--") else ["demo"]
    stderr = refused("train", *source, *words, "--out", "run")
    assert message in stderr
    assert stderr.startswith("error: ")
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("command", ["plan", "doctor", "fidelity", "encode", "config show"])
def test_every_command_reads_settings_in_the_same_way(directory, command):
    extra = ["--cheap", "method.eta=0.5"] if command == "fidelity" else []
    message = refused(*command.split(), "demo", "granularity=1", *extra)
    assert "Did you mean 'method.granularities'" in message
    assert list(directory.iterdir()) == []


def test_a_run_that_stops(directory):
    (directory / "failing_reward.py").write_text(
        "def broken(images, prompts):\n    raise OSError('server gone')\n"
    )
    words = (*SMALL, "rewards=[failing_reward:broken]", "--out", "run")
    result = flowgrain("train", "g2rpo", *words)
    assert result.status == 1
    assert "server gone" in result.stderr
    assert "flowgrain train --resume run" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("error", "status"), [(Interrupted, 130), (RunStopped, 1)])
def test_exit_statuses(monkeypatch, error, status):
    def stop(self, progress, start):
        raise error("the reason")

    monkeypatch.setattr(Trainer, "train", stop)
    result = flowgrain("train", *SMALL)
    prefix = "" if error is Interrupted else "error: "  # an interruption is not an error
    assert (result.status, result.stderr) == (status, f"{prefix}the reason\n")


def test_other_errors_are_one_line_without_debug(monkeypatch):
    def fail(self, progress, start):
        raise RuntimeError("a mistake in\nthe program")

    monkeypatch.setattr(Trainer, "train", fail)
    result = flowgrain("train", *SMALL)
    assert result.status == 1
    line = (
        r"error: RuntimeError: a mistake in the program \(test_errors.py, line \d+\)\. Use --debug"
    )
    assert re.match(line, result.stderr)
    assert result.stderr.count("\n") == 1
    for words in (("--debug", "train", *SMALL), ("train", *SMALL, "--debug")):
        result = flowgrain(*words)
        assert result.status == 1
        assert "Traceback (most recent call last)" in result.stderr
        assert re.search(line, result.stderr)


@pytest.mark.parametrize(
    ("error", "converted"),
    [
        (OSError(28, "No space left on device"), True),
        (PermissionError(13, "Permission denied", "out/scores.parquet"), True),
        (NotADirectoryError(20, "Not a directory", "."), True),  # above out
        (FileNotFoundError(2, "No such file", "prompts.txt"), False),
        (PermissionError(13, "Permission denied", "/root/model"), False),
        (requests.ConnectionError("no answer"), False),
        (TimeoutError(110, "Connection timed out"), False),
    ],
)
def test_only_errors_of_writing_are_errors_of_the_directory(directory, error, converted):
    with pytest.raises(SettingsError if converted else type(error)) as found:  # noqa: SIM117
        with writing("--out out", Path("out")):
            raise error
    assert str(found.value).startswith("--out out: cannot be written (") == converted


def test_an_expected_error_has_a_traceback_only_with_debug():
    assert "Traceback" not in flowgrain("train", "sampling.num_steps=0").stderr
    result = flowgrain("train", "sampling.num_steps=0", "--debug")
    assert result.status == 2
    assert "Traceback" in result.stderr
    assert "error: sampling.num_steps=0" in result.stderr


def test_the_version():
    result = flowgrain("--version")
    assert (result.status, result.stdout) == (0, f"flowgrain {__version__}\n")


@pytest.mark.slow
def test_square_brackets_are_not_markup(directory):
    result = flowgrain("train", "g2rpo", *SMALL, "--out", "a[red]b")
    assert result.status == 0, result.stderr
    assert "into a[red]b\n" in result.stdout
    assert "open a[red]b/report.html\n" in result.stdout
    output = flowgrain("evaluate", "a[red]b", "--steps", "1", "--out", "[bold]c").stdout
    assert "[bold]c/scores.parquet" in output
    assert "'[red]'" in flowgrain("train", "[red]").stderr
    (directory / "mine.py").write_text(
        "from flowgrain import register_reward\n"
        "@register_reward('[red]')\ndef red(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    words = ("g2rpo", *SMALL, "rewards=[{name: '[red]'}]", "--plugin", "mine.py")
    assert "reward [red]" in flowgrain("doctor", *words).stdout
    result = flowgrain("train", *words, "--out", "d")
    assert "[red] 0." in result.stderr  # the line of progress


def test_a_reward_class_that_needs_arguments(directory):
    (directory / "needs.py").write_text(
        "class Needs:\n    def __init__(self, size):\n        pass\n"
        "    def __call__(self, images, prompts):\n        return images.mean((1, 2, 3))\n"
    )
    message = refused("train", "g2rpo", *SMALL, "rewards=[needs:Needs]", "--out", "run")
    assert message.count("\n") == 1
    assert "rewards[needs:Needs]" in message
    assert "size" in message
    assert not (directory / "run").exists()
