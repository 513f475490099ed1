"""SIGINT and SIGTERM at any moment of a step: within two seconds, and without a loss."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from toy import PROMPTS, Toy, red

from flowgrain import Trainer, load_config
from flowgrain.rewards import Scorer
from flowgrain.training import Interrupted, checkpoint
from flowgrain.training import trainer as trainer_module
from flowgrain.training.policy_gradient import PolicyGradientLoss
from flowgrain.training.signals import StopSignal

SMALL = {
    "sampling.num_steps": 4,
    "method.group_size": 3,
    "training.prompts_per_step": 2,
    "training.max_steps": 3,
    "evaluation.every": 2,
    "evaluation.num_prompts": 4,
    "evaluation.num_steps": 4,
    "evaluation.rewards": [],
}


def toy(folder, reward=red, **changes):
    config = load_config("g2rpo", {**SMALL, **changes})
    given = {"backbone": Toy(), "prompts": PROMPTS, "eval_prompts": PROMPTS}
    return Trainer(config, folder, rewards={"red": reward}, **given)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}


def without_times(lines):
    return [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in lines]


def signal_at(call, number=signal.SIGTERM, sleep=30.0):
    """The toy's reward. During call number `call` a signal arrives, and the reward then hangs."""
    calls = []

    def reward(images, prompts):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            time.sleep(sleep)
        return red(images, prompts)

    return reward


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = toy(folder)
    return trainer.train(), weights(trainer)


# Calls of the reward: evaluation 0, steps 1 and 2, evaluation 2, step 3, evaluation 3.
@pytest.mark.parametrize(
    ("call", "step"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2), (6, 3)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_hanging_reward_ends_within_two_seconds_and_the_run_is_exact(
    tmp_path, whole, call, step, number
):
    begin = time.monotonic()
    with pytest.raises(Interrupted, match=rf"step {step}\b.*call resume\(\)"):
        toy(tmp_path, signal_at(call, number)).train()
    assert time.monotonic() - begin < 2 + 2  # two seconds for the steps before
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{step:06d}"
    resumed = toy(tmp_path)
    resumed.resume()
    lines = resumed.train()
    assert without_times(lines) == without_times(whole[0])
    for name, value in weights(resumed).items():
        assert torch.equal(value, whole[1][name]), name


def test_a_reward_in_the_background_that_hangs(tmp_path):
    changes = {"sampling.prompts_per_chunk": 1, "evaluation.every": 0}
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="stopped after step 0"):
        toy(tmp_path, signal_at(1), **changes).train()
    assert time.monotonic() - begin < 3


def test_a_signal_while_sampling_and_while_updating(tmp_path, monkeypatch):
    """Before the first update, the step is abandoned. The parameters do not change."""
    for place in ("rollout_velocity", "train_velocity"):
        changes = {"evaluation.every": 0, "training.micro_batch_size": 1}
        trainer = toy(tmp_path / place, **changes)
        before, velocity, calls = weights(trainer), getattr(trainer.policy, place), []

        def stop(*arguments, velocity=velocity, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return velocity(*arguments)

        monkeypatch.setattr(trainer.policy, place, stop)
        with pytest.raises(Interrupted, match="stopped after step 0"):
            trainer.train()
        assert len(calls) == 2
        assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items())
        assert all(p.grad is None for p in trainer.policy.parameters.values())


def test_a_signal_after_the_first_update_finishes_the_step(tmp_path, monkeypatch):
    trainer = toy(tmp_path, **{"method.updates_per_rollout": 3, "evaluation.every": 0})
    step, calls = trainer.optimizer.step, []

    def stop(losses):
        result = step(losses)
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(trainer.optimizer, "step", stop)
    with pytest.raises(Interrupted, match="SIGTERM: step 1 is finished and saved"):
        trainer.train()
    assert len(calls) == 3


def test_a_signal_during_a_checkpoint_is_obeyed_after_it(tmp_path, monkeypatch):
    save, trainer = checkpoint.save, toy(tmp_path, **{"training.checkpoint_every": 1})

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", stopped)
    with pytest.raises(Interrupted, match="stopped after step 1"):
        trainer.train()
    assert checkpoint.load(tmp_path / "checkpoints" / "step-000001")["step"] == 1


def test_a_signal_before_the_old_transitions_of_later_updates(tmp_path, monkeypatch):
    changes = {"evaluation.every": 0, "method.updates_per_rollout": 3}
    trainer = toy(tmp_path, **changes)
    prepare, velocity, calls = PolicyGradientLoss.prepare, trainer.policy.train_velocity, []

    def stop(losses):
        os.kill(os.getpid(), signal.SIGTERM)
        prepare(losses)

    def counted(*arguments):
        calls.append(1)
        return velocity(*arguments)

    monkeypatch.setattr(PolicyGradientLoss, "prepare", stop)
    monkeypatch.setattr(trainer.policy, "train_velocity", counted)
    with pytest.raises(Interrupted, match="stopped after step 0"):
        trainer.train()
    assert calls == []


def test_a_run_out_of_time_repeats_its_last_evaluation(tmp_path):
    """Calls of the reward: evaluation 0, step 1, and the last evaluation, which is stopped."""
    changes = {"training.max_seconds": 1e-9, "evaluation.every": 2}
    with pytest.raises(Interrupted, match="step 1 is finished"):
        toy(tmp_path, signal_at(3), **changes).train()
    again = toy(tmp_path, **changes)
    again.resume()
    lines = again.train()
    assert [line["step"] for line in lines] == [0, 1]
    assert "eval/red" in lines[-1]


def test_a_repeated_signal_during_a_long_c_call_is_one_signal(monkeypatch):
    """The handler only runs after the call, but the thread sees both signals at once."""
    ends, stop = [], StopSignal()
    monkeypatch.setattr(os, "_exit", ends.append)

    def send():
        for _ in range(2):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

    with stop.listen(lambda: "nothing"):
        thread = threading.Thread(target=send)
        thread.start()
        begin = time.monotonic()
        while time.monotonic() - begin < 0.3:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # without the GIL
        thread.join()
    assert stop.number == signal.SIGTERM
    assert ends == []


def test_threads_of_a_scorer_do_not_delay_an_error():
    begin = time.monotonic()

    def fail():
        with Scorer({"slow": lambda images, prompts: time.sleep(30)}) as scorer:
            scorer.submit(torch.rand(1, 3, 2, 2), ["a"])
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert time.monotonic() - begin < 1


HANGING = """
import time
from flowgrain import register_reward

calls = []

@register_reward("hanging")
def hanging(images, prompts):
    calls.append(1)
    if len(calls) > 2:
        {hang}
    return images.mean((1, 2, 3))
"""
WAITS = {
    "sleep": "print('hanging now', flush=True); time.sleep(60)",
    "stubborn": """while True:
            try:
                print("hanging now", flush=True)
                time.sleep(60)
            except BaseException:
                pass""",
}


def command(tmp_path, hang):
    (tmp_path / "plugin.py").write_text(HANGING.format(hang=WAITS[hang]))
    words = [f"{name}={value}" for name, value in SMALL.items()]
    words += ["rewards=[hanging]", "training.max_steps=9", "training.checkpoint_every=1"]
    words += ["evaluation.every=0", "--plugin", "plugin.py", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flowgrain", "train", "g2rpo", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "hanging now" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    return process


@pytest.mark.slow
def test_the_command_says_what_happens_and_ends_with_the_run_saved(tmp_path):
    process = command(tmp_path, "sleep")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - begin < 4  # with the end of the interpreter
    assert process.returncode == 130
    assert "SIGTERM: stopping." in errors
    assert re.search(
        r"stopped after step 2; the run is saved in run/checkpoints/step-000002", errors
    )
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, {143}), (signal.SIGINT, {130, 1})], ids=["TERM", "INT"]
)
def test_a_second_signal_ends_a_stubborn_reward_at_once(tmp_path, number, status):
    """The reward catches every exception, so that the first signal has no effect."""
    process = command(tmp_path, "stubborn")
    process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - begin < 3
    assert process.returncode in status
    last = r"again: stopped at once\. The last checkpoint is run/checkpoints/step-000002\. Resume"
    assert re.search(last, errors)
    assert "Traceback" not in errors


def test_signals_have_their_previous_handlers_after_a_run(tmp_path):
    toy(tmp_path, **{"training.max_steps": 1}).train()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    assert trainer_module.StopSignal().number is None
