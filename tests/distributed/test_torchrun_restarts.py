"""Real restarts by torchrun: the run is the undisturbed run, to the bit."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file

REWARD = """
import os
import signal
from flowgrain import register_reward

calls = []

@register_reward("red")
def red(images, prompts):
    calls.append(1)
    names = ("TORCHELASTIC_RESTART_COUNT", "RANK")
    now = ":".join([*(os.environ[name] for name in names), str(len(calls))])
    if now in os.environ["KILLS"].split():
        os.kill(os.getpid(), signal.SIGKILL)
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""
WORDS = (
    *("-m", "flowgrain", "train", "g2rpo", "--plugin", "plugin.py", "--out", "run"),
    *("rewards=[red]", "sampling.num_steps=4", "method.group_size=3"),
    *("training.prompts_per_step=2", "training.max_steps=4", "training.checkpoint_every=1"),
    *("evaluation.num_prompts=4", "evaluation.num_steps=4", "evaluation.every=2"),
)
# Calls of the reward: 1 evaluation 0, 2 step 1, 3 step 2, 4 evaluation 2, 5 step 3.


def torchrun(folder, *options, kills="", words=WORDS):
    """Run the command. `kills`: ATTEMPT:RANK:CALL of the reward at which a process is killed."""
    folder.mkdir(exist_ok=True)
    (folder / "plugin.py").write_text(REWARD)
    command = [sys.executable, "-m", "torch.distributed.run", *options, *words]
    variables = {"KILLS": kills, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def lines(folder):
    text = (folder / "run" / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


def exported(folder):
    return load_file(next((folder / "run" / "export").rglob("*.safetensors")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result = torchrun(folder, "--standalone", "--nproc-per-node", "2")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_processes_lose_nothing(tmp_path, whole):
    """Rank 1 dies before the first checkpoint, then rank 0, which has the lock, in step 3."""
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    result = torchrun(tmp_path, *options, kills="0:1:2 1:0:5")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("failed (exitcode: -9)") == 2
    assert "The run continues from step 0." in result.stderr
    assert "The run continues from step 2." in result.stderr
    assert "the lock of a process that has ended" in result.stderr
    assert lines(tmp_path) == lines(whole)
    found, expected = exported(tmp_path), exported(whole)
    assert found.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in found.items())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_job_continues_with_fewer_processes(tmp_path, whole):
    """As after the loss of a machine, the same job has another number of processes."""
    job = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job-7")
    result = torchrun(tmp_path, *job, "--nproc-per-node", "2", kills="0:1:5")
    assert result.returncode != 0
    result = torchrun(tmp_path, *job, "--nproc-per-node", "1")
    assert result.returncode == 0, result.stderr
    assert "The run continues from step 2." in result.stderr
    for line, expected in zip(lines(tmp_path), lines(whole), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    expected = exported(whole)
    for name, value in exported(tmp_path).items():
        assert (value - expected[name]).abs().max() < 1e-5, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_settings_error_is_not_repeated(tmp_path):
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    result = torchrun(tmp_path, *options, words=(*WORDS, "training.max_steps=-1"))
    assert result.returncode != 0
    assert "training.max_steps=-1" in result.stderr
    assert "Restart 1 by torchrun ended at once" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_run_continues_without_a_lost_machine(tmp_path):
    """Two torchrun processes are two machines. One of them is killed with its training process."""
    (tmp_path / "plugin.py").write_text(REWARD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    options = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3")
    options += ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "job-9")
    options += ("--rdzv-conf", "last_call_timeout=20")
    words = (*WORDS, "training.max_steps=1000", "evaluation.every=0")
    command = [sys.executable, "-m", "torch.distributed.run", *options, *words]
    variables = {**os.environ, "KILLS": "", "OMP_NUM_THREADS": "1"}
    machines = []
    try:
        for number in range(2):
            with (tmp_path / f"stderr-{number}").open("w") as errors:
                machine = subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=errors)
            machines.append(psutil.Process(machine.pid))
            time.sleep(2)  # the first has the rendezvous
        second = machines[1]
        metrics, errors = tmp_path / "run" / "metrics.jsonl", tmp_path / "stderr-0"
        wait_until(lambda: metrics.exists() and len(lines(tmp_path)) >= 3)
        assert len(second.children()) == 1
        for process in (*second.children(), second):
            process.kill()
        continues = re.compile(r"The run continues from step (\d+)\.")
        wait_until(lambda: continues.search(errors.read_text()))
        step = int(continues.search(errors.read_text())[1])
        assert step >= 2
        wait_until(lambda: len(lines(tmp_path)) >= step + 2)
        assert [line["step"] for line in lines(tmp_path)][: step + 2] == list(range(1, step + 3))
    finally:
        for machine in machines:
            with contextlib.suppress(psutil.NoSuchProcess):
                machine.terminate()
        psutil.wait_procs(machines, timeout=60)


def wait_until(condition, seconds=300):
    """Wait until `condition` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
