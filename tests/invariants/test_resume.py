"""A run that was killed and resumed is the run that never was, to the bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from flowgrain import checkpoint
from flowgrain.settings import settings
from flowgrain.train import Interrupted, Run

TIMES = ("seconds", "seconds/sample", "seconds/update")


@pytest.fixture
def long(tiny):
    return settings({**tiny.model_dump(), "max_steps": 4, "checkpoint_every": 2, "eval_every": 2, "ema_decay": 0.9})


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def weights(folder):
    return checkpoint.load(checkpoint.checkpoints(folder / "checkpoints")[-1])["policy"]["weights"]


def assert_same(a, b):
    assert lines(a) == lines(b)
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name


def test_resumed_equals_uninterrupted_with_a_damaged_checkpoint(long, tmp_path):
    Run(long, tmp_path / "whole").train()
    first = Run(long, tmp_path / "cut")

    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(stop)
    again = Run(long, tmp_path / "cut")
    assert again.resume() == []
    assert again.steps_done == 2
    again.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")

    last = checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    data = bytearray((last / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (last / "state.pt").write_bytes(data)
    third = Run(long, tmp_path / "cut")
    (message,) = third.resume()
    assert last.name in message
    assert third.steps_done == 2
    third.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_sigkill_at_any_moment(long, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Run(long, whole).train()
    settings_file = tmp_path / "recipe.yaml"
    settings_file.write_text(json.dumps(long.model_dump(mode="json")))
    command = [sys.executable, "-m", "flowgrain", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(settings_file), "threads=1", "--out", str(cut)], env=environment)
    deadline = time.time() + 120
    while (time.time() < deadline and not (cut / "metrics.jsonl").exists()) or len(lines(cut)) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "--resume", str(cut)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(whole, cut)


def test_sigterm_saves_and_says_how_to_resume(long, tmp_path):
    run = Run(long, tmp_path)
    with pytest.raises(Interrupted, match="--resume"):
        run.train(lambda metrics: os.kill(os.getpid(), signal.SIGTERM) if metrics["step"] == 1 else None)
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name == "step-000002"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3)}, None, keep=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left.*step-000001"):
        checkpoint.save(tmp_path, 2, {"a": torch.ones(3)}, None, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert torch.equal(checkpoint.load(tmp_path / "step-000001")["a"], torch.ones(3))


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.1), (4, 0.3)):
        checkpoint.save(tmp_path, step, {}, score, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000004"]
