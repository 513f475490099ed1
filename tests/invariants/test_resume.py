"""A run that was killed and resumed equals the uninterrupted run to the bit."""

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
import yaml
from safetensors.torch import load_file
from toy import PROMPTS, Toy, red
from toy_run import toy_run, toy_run_of

from flowgrain import METHODS, Interrupted, RunStopped, SettingsError, Trainer, load_config
from flowgrain.training import checkpoint


@pytest.fixture
def long(tiny):
    """Four steps with checkpoints, evaluations and an EMA."""
    return tiny.with_changes(
        {
            "training.max_steps": 4,
            "training.checkpoint_every": 2,
            "training.ema_decay": 0.9,
            "evaluation.every": 2,
        }
    )


def toy(config, folder, **given):
    return Trainer(
        config,
        folder,
        backbone=Toy(),
        prompts=PROMPTS,
        eval_prompts=PROMPTS,
        **{"rewards": {"red": red}, **given},
    )


def lines(folder):
    """The lines of metrics.jsonl without durations."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
            found.append(json.loads(line))
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


def tensors(folder):
    """The tensors of the last checkpoint, which must be intact."""
    last = checkpoint.checkpoints(folder / "checkpoints")[-1]
    checkpoint.load(last)
    files = last.glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_same(a, b):
    assert lines(a) == lines(b)
    found, expected = tensors(a), tensors(b)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


OPTIONS = {
    "branchgrpo": {"method.split_steps": [0, 1], "method.group_size": 4},
    "ddpo": {"method.min_count": 3},
    "densegrpo": {"method.calibration.rounds": 1, "method.calibration.samples": 2},
    "e_grpo": {"method.sde_steps": [0, 1], "method.merged_steps": [1, 2]},
    "mend": {"method.tau_factor": 2.0},
    "flow_grpo_fast": {"method.window_size": 2},
    "mixgrpo": {"method.window_size": 2, "method.window_interval": 1},
    "mixgrpo_flash": {"method.window_size": 2, "method.window_interval": 1},
    "mixgrpo_flash_star": {"method.window_size": 2, "method.window_interval": 1},
}
"""Options that fit four steps, or with which a state changes in three steps."""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_killed_in_an_update_and_resumed(tmp_path, processes, method):
    changes = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "optimizer.learning_rate": 1e-2,
        "training.prompts_per_step": 2,
        "training.max_steps": 4,
        "training.checkpoint_every": 1,
        "training.ema_decay": 0.5,
        "evaluation.every": 0,
        "evaluation.rewards": [],
        "runtime.threads": 1,
        **OPTIONS.get(method, {}),
    }

    def run(folder, kill=None):
        arguments = (method, changes, folder, kill)
        process = processes.Process(target=toy_run_of, args=arguments)
        process.start()
        process.join(120)
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "cut", kill=3) == -signal.SIGKILL
    assert len(lines(tmp_path / "cut")) == 2
    assert run(tmp_path / "cut") == 0
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling.explore.candidates": 8, "sampling.explore.num_steps": 2},
        {"training.adaptive_groups.probe": 2, "training.adaptive_groups.min_spread": 0.12},
    ],
    ids=["explore", "adaptive groups"],
)
def test_chosen_samples_and_replaced_prompts_after_a_resume(tmp_path, changes):
    settings = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "optimizer.learning_rate": 1e-2,
        "training.prompts_per_step": 2,
        "training.max_steps": 3,
        "training.checkpoint_every": 1,
        "evaluation.every": 0,
        "evaluation.rewards": [],
        **changes,
    }
    config = load_config("flow_grpo", settings)
    toy(config, tmp_path / "whole").train()

    def stop(metrics):
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy(config, tmp_path / "cut").train(stop)
    again = toy(config, tmp_path / "cut")
    again.resume()
    again.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")
    names = ("explore/spearman", "adaptive/replaced_prompts")
    found = [line[name] for line in lines(tmp_path / "cut") for name in names if name in line]
    assert any(found)


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


@pytest.fixture
def processes(monkeypatch):
    """Starts processes from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    # The server that forks does not take sys.path.
    monkeypatch.setenv("PYTHONPATH", str(Path(toy_run_module.__file__).parent), prepend=os.pathsep)
    context.set_forkserver_preload(["toy_run"])
    return context


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path, processes):
    """Killed six times, wherever it is, and resumed every time."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def start(folder):
        process = processes.Process(target=toy_run, args=(folder,))
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


def test_a_signal_saves_and_says_how_to_resume(long, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / signal.Signals(number).name
        trainer = toy(long, folder)

        def send(metrics, number=number):
            if metrics["step"] == 1:
                os.kill(os.getpid(), number)

        message = (
            rf"{folder.name}: stopped after step 1; .*Trainer\(config, '{folder}', .*resume\(\)"
        )
        with pytest.raises(Interrupted, match=message):
            trainer.train(send)
        assert checkpoint.checkpoints(folder / "checkpoints")[-1].name == "step-000001"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_at_a_resume_changes_nothing(tiny, tmp_path):
    """A limit of file sizes stands for the disk: a resume replaces metrics.jsonl."""
    config = tiny.with_changes({"training.max_steps": 2, "training.checkpoint_every": 1})
    toy(config, tmp_path).train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = toy(config, tmp_path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    message = (
        r"cannot be resumed yet: .*File too large\. Nothing is lost\. Free some disk .*resume\(\)"
    )
    try:
        with pytest.raises(RunStopped, match=message):
            again.resume()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
    assert toy(config, tmp_path).resume() == []


@pytest.mark.slow
def test_a_command_line_run_is_killed_and_resumed(tiny, tmp_path):
    """Once by the commands that a user types."""
    file, cut = tmp_path / "recipe.yaml", tmp_path / "cut"
    changes = {
        "training.max_steps": 3,
        "training.checkpoint_every": 1,
        "runtime.threads": 1,
    }
    file.write_text(yaml.safe_dump(tiny.with_changes(changes).to_dict()))
    command = [sys.executable, "-m", "flowgrain", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(file), "--out", str(cut)], env=environment)
    deadline = time.time() + 120
    while time.time() < deadline and not ((cut / "metrics.jsonl").exists() and lines(cut)):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        [*command, "--resume", str(cut)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(cut)] == [1, 2, 3]


def test_a_resumed_run_has_its_own_learning_rate_and_decay(long, tmp_path):
    start = long.with_changes({"training.max_steps": 1, "evaluation.every": 0})
    toy(start, tmp_path).train()
    changes = {"optimizer.learning_rate": 5e-4, "training.ema_decay": 0.5}
    again = toy(long.with_changes(changes), tmp_path)
    again.resume()
    assert again.optimizer.adamw.param_groups[0]["lr"] == 5e-4
    assert again.policy.ema.decay == 0.5


def test_another_run_is_refused(long, tmp_path):
    toy(long.with_changes({"training.max_steps": 1, "evaluation.every": 0}), tmp_path).train()
    for setting, value, message in (
        ("runtime.seed", 3, r"runtime\.seed=3: .* was started with 0 and must keep it"),
        ("training.ema_decay", 0.0, r"training\.ema_decay=0.* cannot start or stop the EMA"),
    ):
        with pytest.raises(SettingsError, match=message):
            toy(long.with_changes({setting: value}), tmp_path).resume()


def test_incomplete_files_of_a_killed_run_are_deleted(long, tmp_path):
    toy(long.with_changes({"training.max_steps": 2}), tmp_path).train()
    half = tmp_path / "evaluations" / ".step-000002.json.77.tmp"
    half.write_text("{")
    again = toy(long, tmp_path)
    again.resume()
    assert not half.exists()
    names = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert [name for name in names if name.endswith(".json")] == [
        "step-000000.json",
        "step-000002.json",
    ]


@pytest.mark.parametrize(
    "method",
    ["g2rpo", *(pytest.param(m, marks=pytest.mark.slow) for m in ("diffusionnft", "crd", "mend"))],
)
def test_lora_resumes_to_the_bit(tmp_path, method):
    """An adapter, and for some methods a second adapter of the slowly moving policy."""
    changes = {
        "lora.rank": 2,
        "method.group_size": 3,
        "sampling.num_steps": 4,
        "evaluation.every": 0,
        "evaluation.rewards": [],
        "training.prompts_per_step": 2,
        "training.max_steps": 3,
        "training.checkpoint_every": 1,
        "training.ema_decay": 0.9,
    }
    config = load_config(method, changes)
    Trainer(config, tmp_path / "whole").train()
    Trainer(config.with_changes({"training.max_steps": 2}), tmp_path / "cut").train()
    again = Trainer(config, tmp_path / "cut")
    again.resume()
    again.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("diffusionnft", {}),
        ("refl", {}),
        ("draft", {"method.lv_samples": 2}),
        ("mend", {"method.tau_factor": 2.0, "optimizer.learning_rate": 1e-2}),
        ("mixgrpo", {"method.window_size": 1, "method.window_interval": 1}),
        ("dancegrpo", {"method.updates_per_rollout": "per_step"}),
    ],
)
def test_methods_with_a_state_resume_to_the_bit(tmp_path, method, changes):
    """An old policy that follows, random steps, a moving window, and several updates."""
    shared = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "training.prompts_per_step": 2,
        "training.max_steps": 4,
        "training.checkpoint_every": 1,
        "evaluation.every": 0,  # a shorter run is also evaluated after its own last step
    }
    config = load_config(method, {**shared, **changes})
    toy(config, tmp_path / "whole").train()
    toy(config.with_changes({"training.max_steps": 2}), tmp_path / "cut").train()
    again = toy(config, tmp_path / "cut")
    again.resume()
    again.train()
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_failed_reward_leaves_the_last_checkpoint_as_it_was(long, tmp_path):
    """The step that could not be scored updates nothing. A resumed run repeats it."""
    calls = []

    def failing(images, prompts):
        calls.append(1)
        return [float("nan") if len(calls) == 3 else float(i) for i in range(len(images))]

    config = long.with_changes({"evaluation.every": 0, "training.checkpoint_every": 1})
    trainer = toy(config, tmp_path, rewards={"mine": failing})
    with pytest.raises(RunStopped, match=r"step-000002\. Resume with"):
        trainer.train()
    assert lines(tmp_path)[-1]["step"] == 2
    saved = tensors(tmp_path)
    parameters = trainer.policy.parameters.items()
    assert all(torch.equal(p, saved[f"weights.{name}"]) for name, p in parameters)


def test_a_full_disk_during_training_names_the_resume_command(long, tmp_path, monkeypatch):
    trainer = toy(long, tmp_path)

    def full(line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.recorder, "write_metrics", full)
    with pytest.raises(RunStopped, match=r"No space left .*resume with Trainer\(config"):
        trainer.train()


def test_a_diverged_run_can_be_resumed_with_other_settings(tiny, tmp_path):
    config = tiny.with_changes({"optimizer.max_skipped_updates": 1, "training.max_steps": 3})
    trainer = toy(config, tmp_path)
    first = next(iter(trainer.policy.parameters.values()))
    trainer.policy.train_velocity = lambda x, sigma, cond, guidance: x * first.sum() * torch.nan
    with pytest.raises(RunStopped, match="smaller learning rate"):
        trainer.train()
    again = toy(config.with_changes({"optimizer.learning_rate": 1e-5}), tmp_path)
    again.resume()
    assert again.steps_done == 1
    assert [line["step"] for line in again.train()] == [1, 2, 3]
