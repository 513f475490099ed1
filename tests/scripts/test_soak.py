"""The soak script: it passes for the code as it is, and it notices what it should notice."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def soak():
    """The script as a module. Its processes must be able to import it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SCRIPTS), prepend=os.pathsep)
        patch.syspath_prepend(str(SCRIPTS))
        import soak

        yield soak


@pytest.fixture(scope="module")
def result(soak, tmp_path_factory):
    """Twelve steps with every fault of a single process once, and the directory."""
    folder = tmp_path_factory.mktemp("soak")
    return soak.soak(folder, steps=12, seed=1, faults=len(soak.FAULTS) - 1), folder


@pytest.mark.slow
def test_every_fault_once(soak, result):
    report, _ = result
    # A test of the invariants kills one of two processes.
    assert {fault for fault, _ in report.faults} == set(soak.FAULTS) - {"rank"}
    assert sum(outcome == "stopped" for _, outcome in report.faults) >= 4
    assert report.memory_growth == pytest.approx(1, abs=0.2)
    assert report.server_memory < 1.5


@pytest.mark.slow
def test_the_faults_disturbed_the_run(result):
    """A fault that stopped the disturbed run has left its message, and no other fault has."""
    report, folder = result
    stopped = {fault for fault, outcome in report.faults if outcome == "stopped"}
    messages = (folder / "cut.messages").read_text() if (folder / "cut.messages").exists() else ""
    assert ("the reward raises" in messages) == ("raise" in stopped)
    assert "call resume(), then train()" in messages or not stopped & {"raise", "nan", "disk"}
    assert list((folder / "cut" / "checkpoints").glob("damaged-*"))  # the truncated checkpoint
    assert not (folder / "whole.messages").exists()


@pytest.mark.slow
def test_a_difference_is_noticed(soak, result, tmp_path):
    _, folder = result
    for name in ("whole", "cut"):
        shutil.copytree(folder / name, tmp_path / name)
    config = soak.load_config("g2rpo", soak.SETTINGS)
    whole, cut = (soak.Run(tmp_path / name, config) for name in ("whole", "cut"))
    soak.check_equal(whole, cut)

    file = sorted(cut.checkpoints()[-1].glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    changed = tensors[name].flatten().clone()
    changed[0] = torch.nextafter(changed[0], torch.tensor(float("inf")))
    save_file({**tensors, name: changed.reshape(tensors[name].shape)}, file)
    with pytest.raises(AssertionError, match=f"{name}.* differs"):
        soak.check_equal(whole, cut)

    lines = (cut.folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    text = json.dumps({**last, "loss": last["loss"] + 1e-9})
    (cut.folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], text]) + "\n")
    with pytest.raises(AssertionError, match="the metrics differ"):
        soak.check_equal(whole, cut)


@pytest.mark.parametrize(
    ("fault", "code", "too_late", "message", "reason"),
    [
        ("raise", 0, False, False, "ended with exit code 0"),  # the fault passed unnoticed
        ("nan", 3, False, False, "without a message"),
        ("kill", 3, False, True, "ended with exit code 3"),
        ("stop", 1, False, True, "ended with exit code 1"),
        ("raise", 0, True, False, None),
        ("raise", 3, False, True, None),
        ("kill", -signal.SIGKILL, False, False, None),
    ],
)
def test_an_unexpected_end_is_noticed(soak, fault, code, too_late, message, reason):
    if reason is None:
        soak.check_exit(fault, code, too_late, message)
        return
    with pytest.raises(AssertionError, match=reason):
        soak.check_exit(fault, code, too_late, message)


def test_memory_growth(soak, tmp_path):
    run = soak.Run(tmp_path / "run", soak.load_config("g2rpo", soak.SETTINGS))
    run.memory.write_text("".join(f"{value}\n" for value in (9, 9, 1, 2, 3, 4)))
    assert soak.memory_growth(run) == 2
