"""Runs of one, two and four processes are the same run, and resume with another number."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rank_work
import torch
from rank_pool import PYTHONPATH, RankPool
from rank_work import make, train

from flowgrain import METHODS, load_run
from flowgrain.distributed import SINGLE, env_rank, local_world_size
from flowgrain.distributed.threads import available_cores, set_threads
from flowgrain.monitors import MONITORS
from flowgrain.records.run_lock import RunLock

PAIRWISE = {"name": "pairwise", "judge": {"name": "score", "reward": "toy:red"}, "comparisons": 4}
SHARDED = {"runtime.rollout_weights": "sharded"}
FULL = {f"{method}-full": (method, {}) for method in METHODS}
LORA = {
    f"{method}-lora": (
        method,
        {"lora.rank": 2, "method.kl_weight": 0.1 if method == "flow_grpo" else 0.0},
    )
    for method in METHODS
}
MORE = {
    "weighted values": ("branchgrpo", {"method.node_value": "softmax"}),
    "sharded rollout": ("g2rpo", SHARDED),
    "sharded gradients": ("flow_grpo", {**SHARDED, "runtime.gradient_reduction": "micro_batch"}),
    "sharded adapter": ("flow_grpo", {**SHARDED, "lora.rank": 2}),
    "reference": ("flow_grpo", {"method.kl_weight": 0.1, "method.updates_per_rollout": 3}),
    "per step": ("dancegrpo", {"method.updates_per_rollout": "per_step", "method.best_of": 2}),
    "draft": ("draft", {"method.last_steps": 3, "method.kl_weight": 0.1}),
    "draft lora": (
        "draft",
        {"lora.rank": 2, "method.lv_samples": 2, "method.updates_per_rollout": 2},
    ),
    "given pairs": ("diffusion_dpo", {"data.pairs": ""}),
    "given images": ("sft", {"data.images": "", "training.prompts_per_step": 6}),
    "pairwise": ("g2rpo", {"sampling.prompts_per_chunk": 2, "rewards": [PAIRWISE]}),
    "reused graphs, lora": (
        "flow_grpo",
        {
            "lora.rank": 2,
            "training.graph_memory": "all",
            "method.updates_per_rollout": 1,
            "sampling.prompts_per_chunk": 2,
        },
    ),
    "explored": ("flow_grpo", {"sampling.explore": {"candidates": 7, "num_steps": 2}}),
    "explored branches": ("g2rpo", {"sampling.explore": {"candidates": 7, "num_steps": 2}}),
    "adaptive": ("flow_grpo", {"training.adaptive_groups": {"probe": 2, "min_spread": 0.1}}),
    "adaptive shards": (
        "diffusionnft",
        {**SHARDED, "training.adaptive_groups": {"probe": 2, "min_spread": 0.1}},
    ),
    "reduced often": (
        "g2rpo",
        {
            **SHARDED,
            "runtime.gradient_reduction": "micro_batch",
            "sampling.decode_batch_size": 3,
        },
    ),
    "reduced often, adaptive": (
        "flow_grpo",
        {
            "runtime.gradient_reduction": "micro_batch",
            "training.micro_batch_size": 2,
            "training.adaptive_groups": {"probe": 2, "min_spread": 0.1},
        },
    ),
    "in chunks": ("mixgrpo", {"sampling.prompts_per_chunk": 2, "training.ema_decay": 0.9}),
}
CASES = {**FULL, **LORA, **MORE}
SQUARED_ERROR = ("flow_grpo_fast", "tp_grpo")
"""Methods whose log-probability is the squared error."""
FEW = {**MORE, **{name: FULL[name] for name in ("g2rpo-full", "diffusionnft-full")}}
FEWER = {
    name: FEW[name]
    for name in ("g2rpo-full", "diffusionnft-full", "sharded adapter", "per step", "in chunks")
}


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)  # the server that forks does not take sys.path
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = RankPool(4)
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The results of one process. Those of a case are computed once."""
    folder, known = tmp_path_factory.mktemp("one"), {}

    def results(name):
        if name not in known:
            known.update(rank_work.every_case(folder, {name: CASES[name]}))
        return known[name]

    return results


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "machines", "cases"),
    [
        pytest.param(2, 1, FEWER, id="2 of some methods"),
        pytest.param(2, 1, CASES, marks=SLOW, id="2"),
        pytest.param(4, 1, CASES, marks=SLOW, id="4"),
        pytest.param(4, 2, FEW, marks=SLOW, id="4 on 2 machines"),
    ],
)
def test_every_method_is_the_same_run(tmp_path, pool, single, size, machines, cases):
    """Within 1e-6: sums over ranks have another order, and other rows share a model call.

    On two machines parameters are sharded within each machine and replicated across them.
    """
    several = pool.run(size, rank_work.every_case, tmp_path, cases, machines=machines)
    for name in cases:
        one, many = single(name), several[name]
        assert many["sharded"] == ("lora" not in name or "adapter" in name), name
        for step in range(3):
            images = one["images"][step].reshape(6, -1)
            torch.testing.assert_close(many["images"][step], images, atol=1e-6, rtol=0, msg=name)
            torch.testing.assert_close(
                many["advantage"][step], one["advantage"][step], atol=1e-4, rtol=1e-4, msg=name
            )
            for key, value in one["metrics"][step].items():
                expected = pytest.approx(value, rel=1e-3, abs=1e-6)
                assert many["metrics"][step][key] == expected, (name, key)
        for key, value in one["weights"].items():
            torch.testing.assert_close(
                many["weights"][key],
                value,
                # The gradient of a squared-error log-probability is smaller by 2 std^2, and AdamW
                # divides by it: rounding is larger.
                atol=5e-6 if any(m in name for m in SQUARED_ERROR) else 1e-6,
                rtol=0,
                msg=lambda message, place=f"{name} {key}": f"{place} {message}",
            )


def test_graphs_within_a_budget_of_every_rank(tmp_path, pool):
    """Each rank reuses its own rows. Sharded parameters are refused."""
    passes, expected, _ = rank_work.reused_graphs(tmp_path / "one", 0.0)
    assert passes == [(0, 54)] * 3
    passes, weights, refused = pool.run(2, rank_work.reused_graphs, tmp_path / "two", 1.5e-6)
    assert passes == [(22, 32)] * 3  # of 136 bytes each
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)
    full, adapter = refused
    assert full.startswith("training.graph_memory=1: the trained parameters are sharded")
    assert full.endswith("Use training.graph_memory=0.")
    assert adapter.endswith("Use runtime.rollout_weights=replica, or training.graph_memory=0.")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
def test_recorded_groups(tmp_path, pool, size):
    """The main rank records its own prompts, which are every `size`-th of the step."""
    rank_work.recorded(tmp_path / "one")
    pool.run(size, rank_work.recorded, tmp_path / "several")
    one, several = (load_run(tmp_path / name).groups[1] for name in ("one", "several"))
    assert [n for n, prompt in enumerate(one.prompts) if prompt.recorded] == [0, 1, 2]
    expected = list(range(0, 6, size))[:3]
    assert [n for n, prompt in enumerate(several.prompts) if prompt.recorded] == expected
    for prompt, other in zip(one.prompts, several.prompts, strict=True):
        assert prompt.text == other.text
        assert prompt.rewards["red"] == pytest.approx(other.rewards["red"], abs=1e-5)
        assert prompt.advantage == pytest.approx(other.advantage, abs=1e-3)
    for number in set(expected) & {0, 1, 2}:
        for place in range(len(one.tree.leaves)):
            pixels = (np.asarray(g.image(number, place)).astype(int) for g in (one, several))
            assert np.abs(np.subtract(*pixels)).max() <= 1


def test_approximate_tails_of_two(tmp_path, pool, monkeypatch):
    directory = str(Path(sys.prefix) / "aside")
    monkeypatch.syspath_prepend(directory)
    pytest.importorskip("torchao")
    two = pool.run(2, rank_work.approximate_tails, tmp_path / "two", directory)
    one = rank_work.approximate_tails(tmp_path / "one", directory)
    torch.testing.assert_close(two["cache"], one["cache"], atol=1e-3, rtol=0)
    # Two ranks use batches of another size, whose last bits differ. int8 rounding can turn such a
    # difference into a whole quantization level, so single pixels can differ. Advantages divide by
    # the spread of the rewards; they are not compared.
    difference = (two["weights"] - one["weights"]).abs()
    # Measured: .0004 to .004, depending on the kernels. Images of different noise differ by .2.
    assert difference.mean() < 0.01
    assert "sharded. Set runtime.rollout_weights=replica" in two["refused"]


HELD = {
    "full": (
        ("g2rpo", {**SHARDED, "training.ema_decay": 0.9}),
        {"transformer": "4 w", "AdamW": "8 w", "EMA": "4 w"},
    ),
    "replica": (
        ("g2rpo", {"runtime.rollout_weights": "replica"}),
        {"transformer": "4 w", "AdamW": "8 w", "sampling copy": "4 w n"},
    ),
    "reference": (
        ("flow_grpo", {**SHARDED, "method.kl_weight": 0.1}),
        {"transformer": "4 w", "AdamW": "8 w", "reference": "4 w"},
    ),
    "lora": (("g2rpo", {"lora.rank": 2}), {"transformer": "4 w n", "AdamW": "8 t n"}),
    "old adapter": (
        ("diffusionnft", {"lora.rank": 2}),
        {"transformer": "4 w n", "AdamW": "8 t n", "old": "4 t n"},
    ),
}


@pytest.mark.parametrize("size", [1, 4])
def test_memory_of_all_ranks_together(tmp_path, pool, size):
    """The formulas of docs/guides/scaling.md.

    n ranks together hold a sharded part once, and a whole part n times.
    """
    cases = {name: case for name, (case, _) in HELD.items()}
    if size == 1:
        found = rank_work.held_bytes(tmp_path, cases)
    else:
        found = pool.run(size, rank_work.held_bytes, tmp_path, cases)
    for name, (_, formulas) in HELD.items():
        parts, w, t = found[name]
        letters = {"w": w, "t": t, "n": size}
        expected = {
            part: math.prod(letters.get(letter) or int(letter) for letter in formula.split())
            for part, formula in formulas.items()
        }
        if size == 1:
            expected.pop("sampling copy", None)  # in float32 one process samples with the model
        assert {part: count for part, count in parts.items() if count} == expected, name


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("g2rpo", {"training.ema_decay": 0.8}),
        pytest.param("g2rpo", {**SHARDED, "lora.rank": 2}, marks=SLOW),
        pytest.param("diffusionnft", {}, marks=SLOW),
        pytest.param("densegrpo", {}, marks=SLOW),
    ],
)
def test_a_checkpoint_resumes_with_another_number_of_ranks(tmp_path, pool, method, changes):
    """Two steps on four ranks, two on one and two on two give the run of six steps on one.

    Metrics and parameters agree within 1e-6. The calibrated noise of DenseGRPO is part of the
    checkpoint, so it is not calibrated again.
    """
    changes = {"training.checkpoint_every": 1, "evaluation.every": 2, **changes}
    whole = train(tmp_path / "whole", {**changes, "training.max_steps": 6}, method)
    cut = tmp_path / "cut"
    pool.run(4, train, cut, {**changes, "training.max_steps": 2}, method)
    if method == "densegrpo":
        (cut / "calibration.json").unlink()
    middle = train(cut, {**changes, "training.max_steps": 4}, method)
    assert [line["step"] for line in middle["lines"]] == [0, 1, 2, 3, 4]
    found = pool.run(2, train, cut, {**changes, "training.max_steps": 6}, method)
    assert not (cut / "calibration.json").exists()
    for key, value in whole["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, atol=1e-6, rtol=0)
    assert [line["step"] for line in found["lines"]] == list(range(7))
    for one, many in zip(whole["lines"], found["lines"], strict=True):
        for name in one:
            if name != "forward_passes":  # four ranks do work for eight prompts
                assert many[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    manifest = json.loads((cut / "checkpoints" / "step-000006" / "manifest.json").read_text())
    assert "metrics.jsonl" in manifest["sha256"]
    assert sum(name.startswith("shard-") for name in manifest["sha256"]) == 2


WATCHED = {
    "evaluation.every": 1,
    "training.max_steps": 2,
    "training.ema_decay": 0.5,
    "watch.features": "shapes",
    "watch.threshold": 0,
    "watch.direction": "change",
}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
def test_monitors_and_alarms_are_the_same(tmp_path, pool, size):
    one = train(tmp_path / "one", WATCHED)
    several = pool.run(size, train, tmp_path / "several", WATCHED)
    for expected, found in zip(one["lines"], several["lines"], strict=True):
        assert set(found) == set(expected)
        for name, value in expected.items():
            if "monitor/" in name or name == "alarms":
                assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    records = [
        [json.loads(path.read_text()) for path in sorted(folder.glob("evaluations/step-*.json"))]
        for folder in (tmp_path / "one", tmp_path / "several")
    ]
    for expected, found in zip(*records, strict=True):
        assert set(found["monitors"]) == set(MONITORS)
        for name, column in expected["monitors"].items():
            assert found["monitors"][name] == [
                None if value is None else pytest.approx(value, rel=1e-3, abs=1e-6)
                for value in column
            ], name


@pytest.mark.parametrize(
    ("how", "error", "step"), [("reward", "RunStopped", 1), ("signal", "Interrupted", 1)]
)
def test_a_reason_to_stop_on_one_rank_stops_all_after_the_same_step(
    tmp_path, pool, how, error, step
):
    found = pool.run(2, rank_work.stopped, tmp_path / "run", how)
    assert [rank[:2] for rank in found] == [(error, step)] * 2
    assert found[0][2] == found[1][2]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()


@pytest.mark.parametrize("method", ["draft", "refl", "mend", "sft"])
def test_a_failure_on_one_rank_stops_all_before_an_update(tmp_path, pool, method):
    found = pool.run(2, rank_work.failing_on_one_rank, tmp_path / "run", method)
    assert found[0] == found[1]
    message, updates, steps = found[0]
    assert ("image-" if method == "sft" else "OSError: gone") in message
    assert (updates, steps) == (0, 0)


def test_the_main_rank_locks_the_directory_and_all_ranks_learn_the_outcome(tmp_path, pool):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    found = pool.run(2, rank_work.refused, tmp_path / "run")
    assert found[0] == found[1]
    assert "another process trains in this directory" in found[0][0]
    assert not found[0][1]
    lock.release()
    assert pool.run(2, rank_work.held_locks, tmp_path / "run") == ([True, False], [False, False])


def test_the_export_of_sharded_parameters(tmp_path, pool):
    """It equals the export of one process, and loads in diffusers."""
    from diffusers import SD3Transformer2DModel

    found = pool.run(2, rank_work.export_shapes, tmp_path / "run")
    path = tmp_path / "run" / "export" / "transformer"
    loaded = SD3Transformer2DModel.from_pretrained(path).state_dict()
    assert set(loaded) == set(found)
    for name, value in found.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.slow
def test_a_killed_rank_ends_all(tmp_path):
    """Under torchrun: an error within a minute, an intact checkpoint, and one rank less resumes."""
    folder = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*launcher, "--nproc-per-node", "2", rank_work.__file__, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    try:
        deadline = time.time() + 100
        third = folder / "checkpoints" / "step-000003"
        while time.time() < deadline and process.poll() is None and not third.exists():
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        os.kill(int((tmp_path / "run-1.pid").read_text()), signal.SIGKILL)
        begin = time.time()
        assert process.wait(timeout=60) != 0
        assert time.time() - begin < 60
        assert "SIGKILL" in process.stderr.read()
    finally:
        process.terminate()  # it ends its ranks
    steps = 8 + len(list((folder / "checkpoints").glob("step-*")))
    trainer = make(folder, {"training.checkpoint_every": 1, "training.max_steps": steps})
    trainer.resume()
    assert trainer.steps_done >= 3
    trainer.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(steps + 1))  # 0: before training


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_exchange_values(pool, size):
    found = pool.run(size, rank_work.world_sums, 6)
    assert [rank["rank"] for rank in found] == list(range(size))
    assert [rank["main"] for rank in found] == [True] + [False] * (size - 1)
    assert found[1]["assigned"] == ([1, 3, 5] if size == 2 else [1, 5])
    assert all(rank["interleaved"] == [0, 1, 2, 3, 4, 5] for rank in found)
    assert all(rank["any"] == (True, False) for rank in found)
    assert all(rank["sum"] == [sum(range(1, size + 1))] * 2 for rank in found)


def test_a_single_process_is_a_world_of_size_1():
    assert (SINGLE.rank, SINGLE.size, SINGLE.is_main) == (0, 1, True)
    assert SINGLE.assign(3).tolist() == [0, 1, 2]
    assert SINGLE.gather("a") == ["a"]
    assert SINGLE.interleave([torch.arange(3)], 3).tolist() == [0, 1, 2]
    assert SINGLE.any(True)


def test_rank_and_threads_are_read_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert env_rank() == (0, 1, 0)
    assert local_world_size() == 1
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_threads(0)
    assert used == []  # a single process keeps torch's default
    set_threads(3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    set_threads(0)
    assert used == [3, max(1, available_cores() // 2)]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # set by the user
    set_threads(0)
    assert len(used) == 2
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert env_rank() == (3, 4, 1)
