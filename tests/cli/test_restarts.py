"""`flowgrain train` in a job that torchrun, or a job scheduler, starts again."""

import json
import os
import signal

import pytest
from command_line import SMALL, flowgrain, refused, succeeded
from safetensors.torch import load_file

from flowgrain.training import trainer as trainer_module

WORDS = ("train", "g2rpo", *SMALL, "training.checkpoint_every=1", "training.max_steps=3")
REWARD = """
from pathlib import Path
from flowgrain import register_reward

@register_reward("red")
def red(images, prompts):
    if Path("broken").exists():
        raise OSError("no reward")
    return images[:, 0].mean((1, 2))
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugin.py").write_text(REWARD)


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """Set the environment of an attempt of torchrun."""

    def attempt(number, run_id="job", logs="logs"):
        log = tmp_path / logs / f"{run_id}_x" / f"attempt_{number}" / "0" / "error.json"
        log.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(log))

    return attempt


def words(out="run", *more):
    return (*WORDS, "rewards=[red]", "--plugin", "plugin.py", "--out", out, *more)


def killed_in(step, monkeypatch, error=RuntimeError):
    """End the command in training step `step` with an error that is not recorded."""
    original = trainer_module.train_step

    def train_step(number, *arguments):
        if number == step:
            raise error("killed")
        return original(number, *arguments)

    monkeypatch.setattr(trainer_module, "train_step", train_step)
    result = flowgrain(*words())
    monkeypatch.setattr(trainer_module, "train_step", original)
    assert (result.status, "killed" in result.stderr) == (1, True)


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


@pytest.mark.parametrize(
    ("step", "run_id", "error"),
    [
        (1, "job", RuntimeError),
        pytest.param(3, "none", ConnectionError, marks=pytest.mark.slow),
    ],
)
def test_the_same_command_resumes_in_the_same_job(
    tmp_path, torchrun, monkeypatch, step, run_id, error
):
    monkeypatch.setitem(globals(), "WORDS", (*WORDS, "evaluation.every=2"))
    succeeded(*words("whole"))
    torchrun(0, run_id)
    killed_in(step, monkeypatch, error)
    torchrun(1, run_id)
    result = flowgrain(*words())
    assert result.status == 0, result.stderr
    assert f"The run continues from step {step - 1}." in result.stderr
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    weights = [
        load_file(next((tmp_path / folder / "export").rglob("*.safetensors")))
        for folder in ("run", "whole")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_another_job_does_not_resume(tmp_path, torchrun, monkeypatch):
    torchrun(0, "first")
    killed_in(2, monkeypatch)
    # Another torchrun process with another id. The parent of this process is the same.
    file = tmp_path / "run" / ".job.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "agent": "other"}))
    torchrun(1, "second")
    assert "already contains a run" in refused(*words())
    torchrun(0, "first", "new logs")  # the scheduler has started the job again
    assert flowgrain(*words()).status == 0
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert "already contains a run" in refused(*words())


def test_a_settings_error_is_not_repeated_by_restarts(torchrun, monkeypatch):
    torchrun(0)
    first = refused(*words("run", "training.max_steps=-1"))
    monkeypatch.setattr("flowgrain.cli.train.config_from", None)  # not called
    torchrun(1)
    second = refused(*words("run", "training.max_steps=-1"))
    message = first.removeprefix("error: ").strip().removesuffix(".")
    assert message in second
    assert "Restart 1 by torchrun ended at once, because this error would repeat." in second
    torchrun(2)
    assert "Restart 2" in refused(*words("run", "training.max_steps=-1"))


@pytest.mark.slow
def test_a_stopped_run_is_not_restarted_but_a_new_job_continues(tmp_path, torchrun):
    (tmp_path / "broken").touch()
    torchrun(0)
    first = flowgrain(*words())
    assert first.status == 1
    assert "reward 'red' failed" in first.stderr
    (tmp_path / "broken").unlink()
    torchrun(1)
    second = flowgrain(*words())
    assert second.status == 1
    assert "reward 'red' failed" in second.stderr
    assert "Restart 1 by torchrun ended at once" in second.stderr
    torchrun(0, logs="new logs")
    assert flowgrain(*words()).status == 0
    assert len(lines(tmp_path / "run")) == 3


@pytest.mark.slow
def test_a_signal_by_torchrun_is_told_from_a_signal_by_the_user(tmp_path, torchrun, monkeypatch):
    """torchrun stops all processes when a machine joins, and does not count that as a restart."""
    original = trainer_module.train_step

    def train_step(number, *arguments):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(number, *arguments)

    torchrun(0)
    monkeypatch.setattr(trainer_module, "train_step", train_step)
    assert flowgrain(*words()).status == 130
    monkeypatch.setattr(trainer_module, "train_step", original)
    torchrun(1)  # the process failed
    result = flowgrain(*words())
    assert result.status == 130
    assert "ended at once" in result.stderr
    torchrun(0)  # a machine joined. Later a process fails, which is another restart
    killed_in(3, monkeypatch)
    torchrun(1)
    result = flowgrain(*words())
    assert result.status == 0
    assert "The run continues from step 2." in result.stderr


@pytest.mark.slow
def test_the_lock_of_a_machine_that_is_gone(tmp_path, torchrun, monkeypatch):
    torchrun(0)
    killed_in(2, monkeypatch)
    holder = {"host": "gone", "pid": 1, "started": "2020-01-01 00:00:00+00:00"}
    (tmp_path / "run" / ".lock.json").write_text(json.dumps(holder))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    message = refused("train", "--resume", "run", "--plugin", "plugin.py")
    assert "a process of another host may train in this directory" in message
    torchrun(1)
    result = flowgrain(*words())
    assert result.status == 0
    assert "the lock of a process that has ended (host gone" in result.stderr


@pytest.mark.slow
def test_no_files_of_a_job_without_torchrun(tmp_path):
    succeeded(*words())
    assert not (tmp_path / "run" / ".job.json").exists()
