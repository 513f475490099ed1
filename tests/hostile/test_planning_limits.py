"""Trees, windows and plans stay small whatever their settings are, and their numbers are exact."""

import math

import numpy as np
import pytest

from flowgrain import METHODS, Planner, SettingsError, load_config
from flowgrain.core.cost import count_updates, split_updates
from flowgrain.core.tree import MAX_ROWS, TreeTooLarge
from flowgrain.methods import build_method, plan_tree
from flowgrain.planning.plan import RunPlan
from flowgrain.training import fit
from flowgrain.training.memory import checkpoint_bytes
from flowgrain.training.sizes import size_before_loading


def test_a_planner_stops_at_its_limit():
    planner = Planner(4)
    with pytest.raises(TreeTooLarge, match=r"more than 50,000 rows"):
        planner.sde(planner.root(), fan=10**12)
    assert len(planner._rows) == MAX_ROWS


def test_a_method_of_any_size_is_refused():
    """Also for a method that was made in Python and whose limits were not checked."""
    method = METHODS.get("flow_grpo").model_construct(group_size=10**9)
    with pytest.raises(SettingsError, match=r"^method\.group_size=1000000000: the tree of one "):
        plan_tree(method, 4)


@pytest.mark.parametrize("method", ["flow_grpo", "g2rpo", "dancegrpo", "tempflow_grpo"])
@pytest.mark.parametrize("prompts", [1, 2, 3, 7])
@pytest.mark.parametrize("updates", ["per_step", 1, 2, 3, 5, 37, 1000])
def test_updates_are_counted_as_they_are_divided(method, prompts, updates):
    options = {"name": method, "group_size": 3}
    tree = plan_tree(build_method(options), 5)
    shares = split_updates(tree.repeat(prompts), updates)
    later = sum(map(len, shares[1:]))
    assert count_updates(tree, updates, prompts) == (len(shares), later)


def window_by_steps(method, num_steps, step):
    """The left end of a window, by moving it one training step at a time."""
    last = method._room(num_steps) - method.window_size
    left, until = 0, method._duration(num_steps, 0)
    while max(step, 1) > until and not (left == last and method.window_end == "stay"):
        left += method.window_stride
        if left > last:
            left = last if method.window_end == "stay" else 0
        until += method._duration(num_steps, left)
    return left


@pytest.mark.parametrize("schedule", ["progressive", "decay", "exp_decay", "frozen"])
@pytest.mark.parametrize("end", ["roll_back", "stay"])
@pytest.mark.parametrize("stride", [1, 3, 100])
def test_the_window_is_the_same_as_moved_step_by_step(schedule, end, stride):
    options = {"window_schedule": schedule, "window_end": end, "window_stride": stride}
    for interval, size in ((1, 4), (3, 2), (25, 9)):
        chosen = {**options, "window_interval": interval, "window_size": size}
        method = build_method({"name": "mixgrpo", **chosen})
        for step in [*range(60), 333, 1001]:
            expected = window_by_steps(method, 10, step)
            assert method.window(10, step, 0) == range(expected, expected + size)


def test_the_mean_of_a_long_run_is_close_to_the_exact_mean():
    short = RunPlan(load_config("mixgrpo", {"training.max_steps": 300}))
    exact = [len(short.config.tree(step).evaluated) for step in range(1, 301)]
    assert short.forward_passes_of_steps == exact
    assert short.total_forward_passes == sum(exact) * 24
    long = RunPlan(load_config("mixgrpo", {"training.max_steps": 10_000_000}))
    assert len(long.forward_passes_of_steps) < 1000
    everything = [len(long.config.tree(step).evaluated) for step in range(1, 22 * 25 + 1, 25)]
    assert long.mean_forward_passes == pytest.approx(np.mean(everything), rel=0.05)


def test_needs_grow_with_their_settings():
    def needs(**changes):
        config = load_config("flow_grpo", {k.replace("__", "."): v for k, v in changes.items()})
        return {need.purpose: need.size for need in fit._of_host(config, None, 1)}

    step, evaluation = "the images of a step", "the images of an evaluation"
    base = needs(training__prompts_per_step=100, evaluation__every=5)
    assert needs(training__prompts_per_step=200)[step] == 2 * base[step]
    assert needs(evaluation__num_prompts=512, evaluation__every=5)[evaluation] == (
        2 * base[evaluation]
    )
    assert needs(evaluation__num_prompts=10**6, evaluation__every=0)[evaluation] == 0
    assert needs()[evaluation] == base[evaluation] / 4  # 64 images at the start and the end
    # 24 images of 3 x 32 x 32 float32 twice, and 24 x 11 rows, for each of the prompts
    assert base[step] == 100 * (24 * 2 * 4 * 3 * 32 * 32 + 24 * 11 * 100)
    explored = {"training__prompts_per_step": 100, "sampling__explore__candidates": 96}
    # 96 candidates of 7 rows, which are freed before the exact images
    assert needs(**explored)["the images of the candidates"] == (
        100 * (96 * 2 * 4 * 3 * 32 * 32 + 96 * 7 * 100)
    )


def test_older_parameters_need_memory_of_the_host():
    changes = {"rollout.workers": 1, "rollout.max_staleness": 1, "lora.rank": 0}
    config = load_config("flow_grpo", changes)
    size = size_before_loading(config)
    found = {need.setting: need for need in fit._of_host(config, size, 1)}
    assert found["rollout.max_staleness"].size == 3 * 4 * size.transformer
    with pytest.raises(SettingsError, match=r"^rollout.max_staleness=1: .*max_staleness=0"):
        fit._refuse([found["rollout.max_staleness"]], 1e6, "of memory, but this machine has")


def test_the_disk_counts_only_checkpoints_that_are_written():
    def bytes_of(**changes):
        config = load_config("demo", {f"training.{k}": v for k, v in changes.items()})
        return checkpoint_bytes(config, size_before_loading(config))

    one = bytes_of(max_steps=5, checkpoint_every=10, keep_checkpoints=1)
    assert bytes_of(max_steps=5, checkpoint_every=10, keep_checkpoints=10_000) == one
    assert bytes_of(max_steps=50, checkpoint_every=10, keep_checkpoints=3) == one * 5 / 3
    assert math.isfinite(one)
    assert one > 0


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(fit, "_CGROUP", limit)
    everything = fit.machine_memory()
    limit.write_text("max\n")
    assert fit.machine_memory() == everything
    limit.write_text("1000000\n")
    assert fit.machine_memory() == 1_000_000
