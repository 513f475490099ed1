"""One process, two and four are the same run: images, advantages, weights; checkpoints go from any number to any other."""

import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import group_run
import pytest
import torch
from group_run import as_rank, every_method, held, make, train

from flowgrain.config.schema import PAPER

FULL = {f"{method}-full": (method, {}) for method in PAPER}
LORA = {f"{method}-lora": (method, {"lora_rank": 2, "kl_weight": 0.1 * (method == "flow_grpo")}) for method in PAPER}
MORE = {
    "sharded rollout": ("g2rpo", {"rollout_weights": "sharded"}),
    "sharded adapter": ("flow_grpo", {"rollout_weights": "sharded", "lora_rank": 2}),
    "reference": ("flow_grpo", {"kl_weight": 0.1, "updates_per_rollout": 3}),
    "per step": ("dancegrpo", {"updates_per_rollout": "per_step", "best_of": 2}),
    "in parts": ("mixgrpo", {"window_size": 2, "prompts_per_rollout": 2, "ema_decay": 0.9}),
}
CASES = {**FULL, **LORA, **MORE}


@pytest.fixture(scope="module", autouse=True)
def _search_path():
    with pytest.MonkeyPatch.context() as patch:
        # For the server that forks the processes: it does not take sys.path.
        patch.setenv("PYTHONPATH", str(Path(group_run.__file__).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def together(size, work, folder, *arguments, machines=1):
    """What `work` gives in the first of `size` processes, on as many machines as they are told. Exit codes are checked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["group_run"])
    out = Path(folder) / f"found-{size}.pt"
    processes = [
        context.Process(target=as_rank, args=(rank, size, size // machines, port, work, out, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0] * size
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return every_method(tmp_path_factory.mktemp("one"), CASES)


@pytest.mark.parametrize(("size", "machines"), [(2, 1), (4, 1), (4, 2)])
def test_every_method_is_the_same_run(tmp_path, alone, size, machines):
    """Within 1e-6: sums over processes are taken in another order. Passes are made up of other rows, too.

    On two machines weights are sharded within each and replicated across them.
    """
    cases = CASES if machines == 1 else {**MORE, **{name: FULL[name] for name in ("g2rpo-full", "diffusionnft-full")}}
    several = together(size, every_method, tmp_path, tmp_path / "several", cases, machines=machines)
    for name in cases:
        one, many = alone[name], several[name]
        assert many["sharded"] == ("lora" not in name or "adapter" in name), name
        for step in range(3):
            torch.testing.assert_close(many["images"][step], one["images"][step].reshape(6, -1), atol=1e-6, rtol=0, msg=name)
            torch.testing.assert_close(many["advantage"][step], one["advantage"][step], atol=1e-4, rtol=1e-4, msg=name)
            for key, value in one["metrics"][step].items():
                assert many["metrics"][step][key] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, key)
        for key, value in one["weights"].items():
            torch.testing.assert_close(many["weights"][key], value, atol=1e-6, rtol=0, msg=lambda m, n=name, k=key: f"{n} {k} {m}")


def test_cheaper_tails_of_two(tmp_path, monkeypatch):
    aside = str(Path(sys.prefix) / "aside")
    monkeypatch.syspath_prepend(aside)
    pytest.importorskip("torchao")
    two = together(2, group_run.cheap_tails, tmp_path, tmp_path / "two", aside)
    one = group_run.cheap_tails(tmp_path / "one", aside)
    torch.testing.assert_close(two["cache"], one["cache"], atol=1e-3, rtol=0)
    # Two processes use batches of another size, whose last bits differ. int8 rounding can turn such a difference into
    # a whole quantization level, so single pixels can differ. Advantages divide by the spread of the rewards; not compared.
    difference = (two["weights"] - one["weights"]).abs()
    # Measured: .0004 to .004, depending on the kernels. Images of different noise differ by about .2.
    assert difference.mean() < 0.01
    assert "in each process, and here they are sharded; set rollout_weights=replica" in two["g2rpo"]
    assert "here they are sharded; use lora_rank" in two["diffusionnft"]


HELD = {
    "full": ({"ema_decay": 0.9, "rollout_weights": "sharded"}, {"transformer": "4 w", "AdamW": "8 w", "EMA": "4 w"}),
    "replica": ({"rollout_weights": "replica"}, {"transformer": "4 w", "AdamW": "8 w", "sampling copy": "4 w n"}),
    "reference": (
        {"method": "flow_grpo", "kl_weight": 0.1, "rollout_weights": "sharded"},
        {"transformer": "4 w", "AdamW": "8 w", "reference": "4 w"},
    ),
    "lora": ({"lora_rank": 2}, {"transformer": "4 w n", "AdamW": "8 t n"}),
    "slow adapter": (
        {"lora_rank": 2, "method": "diffusionnft"},
        {"transformer": "4 w n", "AdamW": "8 t n", "old": "4 t n"},
    ),
}


@pytest.mark.parametrize("size", [1, 4])
def test_what_all_hold_together(tmp_path, size):
    """The formulas of docs/scaling.md in bytes: n processes hold a sharded part once together, and a whole one n times."""
    changes = {name: changes for name, (changes, _) in HELD.items()}
    found = together(size, held, tmp_path, tmp_path / "run", changes) if size > 1 else held(tmp_path / "run", changes)
    for name, (_, expected) in HELD.items():
        parts, w, t = found[name]
        letters = {"w": w, "t": t, "n": size}
        wanted = {
            part: math.prod(letters.get(letter) or int(letter) for letter in formula.split()) for part, formula in expected.items()
        }
        if size == 1:
            wanted.pop("sampling copy", None)  # in fp32 one process samples with the model itself
        assert {part: count for part, count in parts.items() if count} == wanted, name


@pytest.mark.parametrize(
    "changes", [{"ema_decay": 0.8}, {"lora_rank": 2, "rollout_weights": "sharded"}, {"method": "diffusionnft"}]
)
def test_checkpoints_go_on_with_another_number_of_processes(tmp_path, changes):
    """Two steps on four processes, two on one, two on two: the curve and the weights of six on one, within 1e-6."""
    rest = {"checkpoint_every": 1, "eval_every": 2, **changes}
    whole_run = make(tmp_path / "whole", max_steps=6, **rest)
    lines = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in whole_run.train()]
    cut = tmp_path / "cut"
    together(4, train, tmp_path, cut, {"max_steps": 2, **rest})
    make_and_train = train(cut, {"max_steps": 4, **rest})
    assert [line["step"] for line in make_and_train["lines"]] == [0, 1, 2, 3, 4]
    found = together(2, train, tmp_path, cut, {"max_steps": 6, **rest})
    for key, value in whole_run.policy.trained.items():
        torch.testing.assert_close(found["weights"][key], value.detach(), atol=1e-6, rtol=0)
    assert [line["step"] for line in found["lines"]] == list(range(7))
    for one, many in zip(lines, found["lines"], strict=True):
        for name in one:
            if name != "forward_passes":  # four processes do work for eight prompts
                assert many[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    kept = json.loads((cut / "checkpoints" / "step-000006" / "manifest.json").read_text())
    assert len(kept["sha256"]) == 2


@pytest.mark.parametrize(("how", "error", "step"), [("reward", "RunStopped", 1), ("signal", "Interrupted", 2)])
def test_what_concerns_one_process_stops_all_after_the_same_step(tmp_path, how, error, step):
    found = together(2, group_run.stopped, tmp_path, tmp_path / "run", how)
    assert [one[:2] for one in found] == [(error, step)] * 2
    assert found[0][2] == found[1][2]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()


def test_an_export_of_sharded_weights(tmp_path):
    """It is what one process writes, and loads in diffusers; nobody but the first process writes."""
    from diffusers import SD3Transformer2DModel

    found = together(2, group_run.export_shapes, tmp_path, tmp_path / "run")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "run" / "export" / "transformer").state_dict()
    assert set(loaded) == set(found)
    for name, value in found.items():
        assert torch.equal(loaded[name], value), name


def test_a_process_that_is_killed_ends_them_all(tmp_path):
    """Under torchrun: an error within a minute, the last checkpoint whole, and a restart with one process fewer goes on."""
    script, folder = group_run.__file__, tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, str(folder)]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 100
        while time.time() < deadline and launcher.poll() is None and not list(folder.glob("checkpoints/step-000003")):
            time.sleep(0.05)
        assert launcher.poll() is None, launcher.stderr.read()
        os.kill(int((tmp_path / "run-1.pid").read_text()), signal.SIGKILL)
        begin = time.time()
        assert launcher.wait(timeout=60) != 0
        assert time.time() - begin < 60
        assert "SIGKILL" in launcher.stderr.read()
    finally:
        launcher.terminate()  # and it ends its own
    run = make(folder, checkpoint_every=1, max_steps=8 + len(list((folder / "checkpoints").glob("step-*"))))
    run.resume()
    done = run.steps_done
    assert done >= 3
    run.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, run.settings.max_steps + 1))
