"""Errors: one message on stderr, an exit status, no traceback, and nothing written."""

import pytest
from command_line import SMALL, flowgrain, refused

from flowgrain import Trainer
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
        (["sampling.num_steps=many"], "sampling.num_steps='many'"),
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
    def stop(self, progress):
        raise error("the reason")

    monkeypatch.setattr(Trainer, "train", stop)
    result = flowgrain("train", *SMALL)
    assert (result.status, result.stderr) == (status, "error: the reason\n")


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(self, progress):
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        flowgrain("train", *SMALL)
