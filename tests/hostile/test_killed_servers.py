"""Servers that are killed during a run: the run with several servers loses nothing."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from toy import PROMPTS, Toy

from flowgrain import RunStopped, Trainer, load_config

PLUGIN = """
import os
import signal
from flowgrain import register_reward

calls = []

@register_reward("red")
def red(images, prompts):
    calls.append(1)
    if len(calls) == int(os.environ["LAST_CALL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""
SMALL = {
    "sampling.num_steps": 4,
    "method.group_size": 6,
    "training.prompts_per_step": 2,
    "training.max_steps": 4,
    "evaluation.every": 2,
    "evaluation.num_prompts": 4,
    "evaluation.num_steps": 4,
    "evaluation.rewards": [],
}


@pytest.fixture
def serve(tmp_path):
    """Start `flowgrain serve` processes. Server i kills itself in call number last_calls[i]."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    processes = []

    def start(*last_calls):
        options = ["--plugin", str(tmp_path / "plugin.py"), "--port", "0"]
        begun = [
            subprocess.Popen(
                [sys.executable, "-m", "flowgrain", "serve", "red", *options],
                env={**os.environ, "LAST_CALL": str(last), "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for last in last_calls
        ]
        processes.extend(begun)
        return begun, [re.search(r"http://\S+?:\d+", p.stdout.readline())[0] for p in begun]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def trained(folder, url, **changes):
    reward = {"name": "remote", "url": url, "reward": "red", "request_size": 4, "backoff": 0.01}
    config = load_config("g2rpo", {**SMALL, "rewards": [reward], **changes})
    given = {"backbone": Toy(), "prompts": PROMPTS, "eval_prompts": PROMPTS}
    trainer = Trainer(config, folder, **given)
    lines = trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    lines = [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in lines]
    return lines, weights, trainer.rewards["remote"].server


@pytest.mark.slow
def test_a_killed_server_costs_nothing_and_the_death_of_all_stops_the_run(tmp_path, serve, caplog):
    processes, (dies, lives) = serve(8, 10**9)
    two_lines, two_weights, server = trained(tmp_path / "two", [dies, lives])
    assert processes[0].wait(timeout=10) == -signal.SIGKILL
    assert f"The reward server at {dies} cannot be used" in caplog.text
    retried = {replica.url: replica.retries for replica in server.replicas}
    assert retried[lives] >= 1
    one_lines, one_weights, _ = trained(tmp_path / "one", lives)
    assert two_lines == one_lines
    assert {line["failed/remote"] for line in two_lines if "failed/remote" in line} == {0}
    for name, value in one_weights.items():
        assert torch.equal(two_weights[name], value), name

    processes, urls = serve(4, 4)
    message = rf"'remote' failed on .*the reward servers at {urls[0]}, {urls[1]} sent no usable"
    with pytest.raises(RunStopped, match=message):
        trained(tmp_path / "none", urls)
    assert [process.wait(timeout=10) for process in processes] == [-signal.SIGKILL] * 2
