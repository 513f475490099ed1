"""A run that was killed and resumed is the run that never was, to the bit."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_run as toy_run_module
from safetensors.torch import load_file
from toy import PROMPTS, Toy, red
from toy_run import toy_run

from flowgrain.training import checkpoint
from flowgrain.config.schema import SettingsError, settings
from flowgrain.training.trainer import Interrupted, Run, RunStopped


@pytest.fixture
def long(tiny):
    return settings({**tiny.model_dump(), "max_steps": 4, "checkpoint_every": 2, "eval_every": 2, "ema_decay": 0.9})


def tensor_in(path):
    found = {"a": torch.zeros(3)}
    checkpoint.read(path, found)
    return found["a"].tolist()


def toy(s, folder):
    return Run(s, folder, backbone=Toy(), prompts=PROMPTS, eval_prompts=PROMPTS, rewards={"red": red})


def lines(folder):
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
            found.append(json.loads(line))
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


def weights(folder):
    last = checkpoint.checkpoints(folder / "checkpoints")[-1]
    checkpoint.load(last)  # it is whole
    return {name: value for file in last.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(a, b):
    assert lines(a) == lines(b)
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name


def test_resumed_equals_uninterrupted_with_a_damaged_checkpoint(long, tmp_path):
    toy(long, tmp_path / "whole").train()
    first = toy(long, tmp_path / "cut")

    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(stop)
    again = toy(long, tmp_path / "cut")
    assert again.resume() == []
    assert again.steps_done == 2
    again.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")

    last = checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    file = next(last.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    third = toy(long, tmp_path / "cut")
    (message,) = third.resume()
    assert last.name in message
    assert third.steps_done == 2
    third.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_sigkill_at_any_moment(tmp_path, monkeypatch):
    """Killed six times, wherever it is, and gone on with each time: curve and weights are the uninterrupted ones."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    context = multiprocessing.get_context("forkserver")
    # For the server, which does not take sys.path.
    monkeypatch.setenv("PYTHONPATH", str(Path(toy_run_module.__file__).parent), prepend=os.pathsep)
    context.set_forkserver_preload(["toy_run"])

    def start(folder):
        process = context.Process(target=toy_run, args=(folder,))
        process.start()
        return process

    def finish(folder):
        process = start(folder)
        process.join(120)
        assert process.exitcode == 0

    finish(whole)
    kills = 0
    for delay in (0.0, 0.013, 0.06, 0.11, 0.2, 0.31):
        process = start(cut)
        before = len(lines(cut)) if (cut / "metrics.jsonl").exists() else 0
        deadline = time.time() + 60
        while process.is_alive() and time.time() < deadline:
            if (cut / "metrics.jsonl").exists() and len(lines(cut)) not in (0, before):
                break
            time.sleep(0.005)
        time.sleep(delay)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 2
    finish(cut)
    assert_same(whole, cut)


def test_sigterm_saves_and_says_how_to_resume(long, tmp_path):
    run = Run(long, tmp_path)
    with pytest.raises(Interrupted, match="--resume"):
        run.train(lambda metrics: os.kill(os.getpid(), signal.SIGTERM) if metrics["step"] == 1 else None)
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name == "step-000002"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3)}, {"b": 1}, None, keep=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowgrain.distributed.mesh.dcp.save", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left.*step-000001"):
        checkpoint.save(tmp_path, 2, {"a": torch.ones(3)}, {}, None, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert tensor_in(tmp_path / "step-000001") == [1, 1, 1]


def test_a_full_disk_at_a_resume_is_told_and_leaves_everything(tiny, tmp_path):
    """A file-size limit stands in for it: metrics.jsonl is written anew when a run is resumed."""
    s = tiny.model_copy(update={"max_steps": 2, "checkpoint_every": 1})
    Run(s, tmp_path).train(report=False)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = Run(s, tmp_path)
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(
            RunStopped, match=r"cannot be resumed yet: .*File too large; nothing is lost: free some space.*--resume"
        ):
            again.resume()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
    assert Run(s, tmp_path).resume() == []


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.1), (4, 0.3)):
        checkpoint.save(tmp_path, step, {"a": torch.ones(3)}, {}, score, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000004"]


def test_a_command_line_run_is_killed_and_resumed(tiny, tmp_path):
    """The same by the commands that a user types, once."""
    settings_file, cut = tmp_path / "recipe.yaml", tmp_path / "cut"
    settings_file.write_text(json.dumps({**tiny.model_dump(mode="json"), "max_steps": 3, "checkpoint_every": 1, "threads": 1}))
    command = [sys.executable, "-m", "flowgrain", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(settings_file), "--out", str(cut)], env=environment)
    deadline = time.time() + 120
    while time.time() < deadline and not ((cut / "metrics.jsonl").exists() and lines(cut)):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "--resume", str(cut)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(cut)] == [1, 2, 3]


def test_a_resume_keeps_its_own_learning_rate_and_refuses_another_run(long, tmp_path):
    Run(long.model_copy(update={"max_steps": 1, "eval_every": 0}), tmp_path).train()
    again = Run(long.model_copy(update={"learning_rate": 5e-4, "ema_decay": 0.5}), tmp_path)
    again.resume()
    assert again.optimizer.param_groups[0]["lr"] == 5e-4
    assert again.policy.ema.decay == 0.5
    for change, message in (({"seed": 3}, "seed=3"), ({"lora_rank": 2}, "lora_rank=2"), ({"ema_decay": 0.0}, "ema_decay=0")):
        with pytest.raises(SettingsError, match=message):
            Run(long.model_copy(update=change), tmp_path).resume()


def test_a_file_that_a_kill_cut_short_is_swept_away(long, tmp_path):
    run = Run(long.model_copy(update={"max_steps": 2}), tmp_path)
    run.train()
    half = tmp_path / "evaluations" / ".step-000002.json.77.tmp"
    half.write_text("{")
    again = Run(long, tmp_path)
    again.resume()
    assert not half.exists()
    assert [path.name for path in sorted((tmp_path / "evaluations").iterdir())] == ["step-000000.json", "step-000002.json"]


def test_lora_resumes_to_the_bit(long, tmp_path):
    s = long.model_copy(update={"lora_rank": 2, "eval_every": 0, "max_steps": 3, "checkpoint_every": 1})
    Run(s, tmp_path / "whole").train()
    Run(s.model_copy(update={"max_steps": 2}), tmp_path / "cut").train()
    again = Run(s, tmp_path / "cut")
    again.resume()
    again.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_failed_reward_leaves_the_last_checkpoint_as_it_was(long, tmp_path):
    """The step that could not be scored updates nothing, so a resume takes it again."""
    calls = []

    def failing(images, prompts):
        calls.append(1)
        return [float("nan") if len(calls) == 3 else float(i) for i in range(len(images))]

    s = long.model_copy(update={"eval_every": 0, "checkpoint_every": 1})
    run = Run(s, tmp_path, rewards={"mine": failing})
    with pytest.raises(RunStopped, match="step-000002"):
        run.train()
    assert lines(tmp_path)[-1]["step"] == 2
    stopped = weights(tmp_path)
    assert all(torch.equal(p, stopped[f"weights.{name}"]) for name, p in run.policy.trained.items())


def test_no_good_checkpoint_is_an_error_and_no_new_start(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3)}, {"b": 1}, None, keep=2)
    (tmp_path / "step-000001" / "manifest.json").write_text("[]")
    with pytest.raises(checkpoint.CheckpointError, match="no good one left"):
        checkpoint.load_last_good(tmp_path)


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3)}, {"b": 1}, None, keep=2)
    (tmp_path / "step-000001").rename(tmp_path / ".old-step-000001")  # the moment between the two renames
    (tmp_path / ".tmp-step-000001").mkdir()
    checkpoint.mend(tmp_path)
    path, state, damaged = checkpoint.load_last_good(tmp_path)
    assert path is not None
    assert state == {"b": 1}
    assert tensor_in(path) == [1, 1, 1]
    assert damaged == []
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    for step, score in ((1, float("nan")), (2, 0.9), (3, 0.1)):
        checkpoint.save(tmp_path, step, {"a": torch.ones(3)}, {}, score, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000003"]
