"""The bench: records, time limits, tables, checks that fail, and all of it with tiny models."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from flowgrain.bench import STEP_NAMES, memory, runner
from flowgrain.bench.iteration import scaled
from flowgrain.bench.numerics import LIMITS, Pair, relative_error, velocity
from flowgrain.bench.published_loop import PublishedLoop
from flowgrain.bench.record import Skipped, StepRecord, read_record, within
from flowgrain.bench.runner import Bench, choose_steps, run_bench
from flowgrain.bench.setup import Setup
from flowgrain.bench.sizes import REAL, TINY, bench_config
from flowgrain.bench.steps import STEPS, run_step
from flowgrain.bench.tables import markdown, read_results
from flowgrain.bench.timing import listed
from flowgrain.config import load_config
from flowgrain.models.published import required_config
from flowgrain.planning.gpus import GPUS
from flowgrain.planning.plan import prompt_cost
from flowgrain.settings import SettingsError


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup("cpu", True, tmp_path)


def tiny_run(setup: Setup, kind: str, *changes: str, name: str = "run"):
    sizes = TINY.kinds[kind]
    config = setup.config(sizes, *sizes.iteration, "runtime.dtype=float32", *changes)
    return setup.trainer(sizes, config, name)


def test_a_measurement_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    def broken():
        raise ValueError("no such kernel")

    def too_large():
        raise torch.OutOfMemoryError("tried to allocate 80 GB")

    def absent():
        raise Skipped("torchao is not installed")

    record = StepRecord("step", tmp_path / "step.json")
    record.run("broken", broken)
    record.run("rows 1", lambda: {"seconds": 1.0}, sweep="rows")
    record.run("rows 8", too_large, sweep="rows")
    record.run("rows 16", lambda: {"seconds": 2.0}, sweep="rows")
    record.run("absent", absent)
    record.run("inside", lambda: within(0.1, 0.2))
    record.run("outside", lambda: within(float("nan"), 0.2))
    found = read_record(tmp_path / "step.json")
    assert found["status"] == "running"  # written before the end
    outcomes = {entry["name"]: entry["outcome"] for entry in found["measurements"]}
    assert outcomes == {
        "broken": "failed",
        "rows 1": "measured",
        "rows 8": "out of memory",
        "rows 16": "skipped",
        "absent": "skipped",
        "inside": "passed",
        "outside": "failed",
    }
    record.finish()
    assert record.status == "failed"
    assert record.error == "failed: broken, outside"
    reasons = {entry["name"]: entry.get("reason") for entry in record.measurements}
    assert "no such kernel" in reasons["broken"]
    assert reasons["rows 16"] == "a smaller batch was out of memory"


def test_memory_and_time_that_run_out(tmp_path):
    def too_large():
        raise torch.OutOfMemoryError("tried to allocate 80 GB")

    record = StepRecord("step", tmp_path / "step.json")
    record.run("rows 8", too_large, sweep="rows")
    record.run("rows 16", too_large, sweep="rows")
    record.finish()
    assert record.status == "done"
    assert [entry["outcome"] for entry in record.measurements] == ["out of memory", "skipped"]
    record.run("early", lambda: {"seconds": 1.0})
    record.seconds = -1.0
    record.run("late", lambda: {"seconds": 1.0})
    record.finish()
    assert (record.status, record.error) == ("timeout", "the time limit of the step is reached")
    assert record.measurements[-1]["outcome"] == "skipped"
    again = StepRecord("step", tmp_path / "step.json", seconds=-1.0)
    again.run("early", lambda: {"seconds": 2.0})
    assert again.measurements[-1]["values"] == {"seconds": 1.0}  # kept from before


def test_a_failed_check_without_a_limit_is_in_the_table(tmp_path):
    record = StepRecord("resume", tmp_path / "step.json")
    record.run("resume", lambda: {"different": ["a"], "passed": False})
    record.finish()
    lines = markdown([read_record(record.file)]).splitlines()
    assert any(line.startswith("| resume | failed |") and "different" in line for line in lines)


def test_data_sheets_of_names():
    assert listed("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert listed("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert listed("NVIDIA H200") is GPUS["h200"]
    assert {listed(f"NVIDIA {name}") for name in ("H100 PCIe", "H100 NVL", "L40S")} == {None}


class Launches:
    """Steps without processes. `statuses`: what a step ends with, by step."""

    def __init__(self, statuses=None) -> None:
        self.statuses, self.started = statuses or {}, []

    def __call__(self, bench, step, seconds):
        self.started.append(step)
        record = StepRecord(step, bench.file(step), seconds)
        record.run("rate", lambda: {"rows_per_second": 2.0, "batch": 1, "resolution": 32})
        if step in self.statuses:
            return self.statuses[step]
        record.finish()
        return None


def test_steps_that_are_done_are_not_repeated(tmp_path):
    bench, notes = Bench(tmp_path / "bench", "cpu", True), []
    launches = Launches({"resume": "timeout", "compile": "crashed"})
    steps = ["machine", "resume", "compile", "tails"]
    assert run_bench(bench, steps, 10, notes.append, launches) == ["resume", "compile"]
    assert launches.started == steps
    timeout = read_record(bench.file("resume"))
    assert (timeout["status"], timeout["error"]) == ("timeout", "the time limit is reached")
    assert timeout["measurements"][0]["values"]["batch"] == 1  # kept from before the limit
    again = Launches()
    assert run_bench(bench, steps, 10, notes.append, again) == []
    assert again.started == ["resume", "compile"]
    assert [record["status"] for record in read_results(bench.out)] == ["done"] * 4
    with pytest.raises(SettingsError, match="contains results of"):
        run_bench(Bench(bench.out, "cpu", False), steps, 10, notes.append, again)
    (bench.out / "bench.json").write_text('{"device": "cp')
    with pytest.raises(SettingsError, match=r"^--out .*bench: bench.json in it is damaged"):
        run_bench(bench, steps, 10, notes.append, again)


def test_names_and_results_of_steps(tmp_path):
    assert tuple(STEPS) == STEP_NAMES
    with pytest.raises(SettingsError, match=r"^--report .*results.json is missing or damaged"):
        read_results(tmp_path)


def test_results_keep_the_steps_of_earlier_calls(tmp_path):
    bench = Bench(tmp_path / "bench", "cpu", True)
    for steps in (["machine", "resume"], ["tails"]):
        run_bench(bench, steps, 10, lambda _: None, Launches())
    records = {record["step"]: record["status"] for record in read_results(bench.out)}
    assert records == dict.fromkeys(("tails", "machine", "resume"), "done")


def test_no_step_starts_without_time(tmp_path):
    launches, bench = Launches(), Bench(tmp_path, "cpu", True)
    assert run_bench(bench, ["machine"], 0.1, lambda _: None, launches) == ["machine"]
    assert launches.started == []


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import time; time.sleep(60)", "timeout"),
        ("raise SystemExit('no CUDA driver')", "crashed"),
    ],
)
def test_a_process_has_a_hard_time_limit(tmp_path, monkeypatch, code, status):
    (tmp_path / "stuck.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "_CHILD", "stuck")
    bench = Bench(tmp_path / "bench", "cpu", True)
    begin = time.monotonic()

    def launch(bench, step, seconds):
        return runner.launch_process(bench, step, 2.0 if status == "timeout" else 60.0)

    assert run_bench(bench, ["machine"], 10, lambda _: None, launch) == ["machine"]
    assert time.monotonic() - begin < 50
    found = read_record(bench.file("machine"))
    assert found["status"] == status
    if status == "crashed":
        assert found["error"] == "the process died: no CUDA driver"


def test_unknown_steps_are_refused():
    with pytest.raises(SettingsError, match=r"--step samplin.*sampling"):
        choose_steps(["samplin"], list(STEPS))
    assert choose_steps(["tails", "machine"], list(STEPS)) == ["machine", "tails"]


def test_other_weights_fail_every_comparison(setup):
    """The limits can tell a wrong kernel from rounding: 3% noise in one kind of weights."""
    host = tiny_run(setup, "sd3", "lora.rank=0", "method.updates_per_rollout=2")
    ours = tiny_run(setup, "sd3", "lora.rank=0", "method.updates_per_rollout=2", name="ours")
    pair = Pair(host, ours, host.collector.collect(1), LIMITS["float32"])
    checks = (pair.velocity, pair.log_probability, pair.gradient)
    assert all(check()["passed"] for check in checks)
    assert relative_error(velocity(ours), velocity(host)) == 0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.policy.model.named_parameters():
            if "to_q" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.3 * parameter.std() * noise
    assert not any(check()["passed"] for check in checks)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_the_published_loop_is_the_same_step_without_shared_states(setup, kind):
    trainer = tiny_run(setup, kind)
    loop = PublishedLoop(trainer)
    config, prompts = trainer.config, trainer.config.training.prompts_per_step
    published = prompts * config.method.published_passes(config.sampling.num_steps)
    shared = prompts * prompt_cost(config).forward_passes
    if kind == "sd3":  # chains share no states
        assert loop.forward_passes == published == shared
    else:  # published code also repeats a step that two granularities have in common
        assert shared < loop.forward_passes <= published
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    seconds = loop.step()
    assert set(seconds) == {"sample", "decode", "score", "update"}
    changed = [not torch.equal(p, before[n]) for n, p in trainer.policy.parameters.items()]
    assert any(changed)


def test_the_published_loop_computes_the_gradient_of_the_library(setup):
    """With the latents and advantages of a rollout, both sides have the same gradient."""
    from flowgrain.bench.numerics import gradient, gradient_of

    trainer = tiny_run(setup, "flux", "lora.rank=0")
    batch, loop = trainer.collector.collect(1), PublishedLoop(trainer)
    reference = gradient(trainer, batch)
    rollout = batch.rollout
    latents = [
        rollout.latents[slot][None] if slot >= 0 else torch.zeros(0) for slot in rollout.slot
    ]
    loop.cond = batch.cond  # the prompts of the step, in its order
    trainer.optimizer.step = lambda losses: None
    loop.update(latents, batch.advantage)
    assert relative_error(gradient_of(trainer.policy.model), reference) < 1e-4


def test_a_recipe_is_scaled_from_its_own_units(setup):
    """A recipe that equals the measured step takes exactly as long."""
    config = bench_config(TINY.sd3, "cpu", *TINY.sd3.iteration)
    seconds = {"sample": 2.0, "decode": 0.5, "score": 0.25, "update": 1.0}
    assert scaled(config, config, seconds)["computed_seconds"] == pytest.approx(3.75)
    double = config.with_changes({"training.prompts_per_step": 4})
    assert scaled(double, config, seconds)["computed_seconds"] == pytest.approx(7.5)


def test_sizes_of_the_published_models_are_built_in():
    for sizes in REAL.kinds.values():
        config = bench_config(sizes, "cpu", *sizes.iteration)
        assert required_config(config.model, "transformer")["_class_name"]
        assert all(rows >= 1 for rows in (*sizes.sampling, *sizes.training))
    with pytest.raises(SettingsError, match="configuration of vae is not known"):
        required_config(bench_config(TINY.sd3, "cpu").model, "vae")


@pytest.mark.slow
def test_phases_of_a_rehearsal_are_stages():
    config = load_config("flow_grpo", {"sampling.num_steps": 4, "training.prompts_per_step": 2})
    predicted = memory.rehearsed_bytes(config)
    assert {"sample", "decode", "update"} <= set(predicted)
    assert all(size > 0 for size in predicted.values())


def test_memory_is_compared_with_the_rehearsal():
    config = bench_config(TINY.sd3, "cpu", *TINY.sd3.iteration)
    measured = {"sample": 10e9, "update": 20e9}
    good = memory.compare_memory(config, measured, lambda _: {"sample": 10.5e9, "update": 19e9})
    assert good["passed"]
    assert good["update_relative_error"] == pytest.approx(-0.05)
    bad = memory.compare_memory(config, measured, lambda _: {"sample": 10e9, "update": 10e9})
    assert not bad["passed"]
    with pytest.raises(Skipped, match=r"model.path=tiny: the configuration"):
        memory.compare_memory(config, measured)
    with pytest.raises(Skipped, match="this needs a GPU"):
        memory.compare_memory(config, {})
    with pytest.raises(Skipped, match="none of the stages"):
        memory.compare_memory(config, measured, lambda _: {"other": 1.0})


def test_tables_of_results_are_markdown(setup, tmp_path):
    file = tmp_path / "machine.json"
    run_step("machine", setup, StepRecord("machine", file))
    text = markdown([read_record(file), read_record(tmp_path / "tails.json")])
    assert "| machine | done |" in text
    assert "| tails | not started |" in text
    assert f"torch {torch.__version__}" in text
    assert "matrix product, bfloat16" in text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), OSError("no file")])
@pytest.mark.parametrize("limit", [60.0, 0.0])
def test_an_error_outside_of_measurements_fails_the_step(
    monkeypatch, setup, tmp_path, error, limit
):
    """Also after the time limit. The step is then not done, so that it is repeated."""

    def work(*_):
        raise error

    monkeypatch.setitem(STEPS, "machine", work)
    record = StepRecord("machine", tmp_path / "machine.json", limit)
    run_step("machine", setup, record)
    found = read_record(record.file)
    assert found["status"] == "failed"
    assert found["error"] == "failed: preparation"
    assert str(error) in found["measurements"][0]["reason"]
    assert "in work" in found["measurements"][0]["traceback"]


@pytest.mark.slow
def test_everything_runs_on_a_cpu(tmp_path):
    """The dry run, with all steps in this process. Checks are within their limits."""
    bench = Bench(tmp_path / "bench", "cpu", True)

    def in_process(bench: Bench, step: str, seconds: float) -> None:
        folder = tmp_path / step
        folder.mkdir()
        run_step(step, Setup("cpu", True, folder), StepRecord(step, bench.file(step), seconds))

    try:
        undone = run_bench(bench, list(STEPS), 60, lambda _: None, in_process)
    finally:
        torch.use_deterministic_algorithms(False)
    records = read_results(bench.out)
    assert undone == [], json.dumps(records, indent=1)
    outcomes = [entry["outcome"] for record in records for entry in record["measurements"]]
    assert outcomes.count("passed") >= 20
    text = (bench.out / "results.md").read_text()
    assert "complete recipe, computed from the measured stages" in text
    assert "published loop" in text


@pytest.mark.slow
def test_the_command_runs_a_step_in_a_process(tmp_path):
    import subprocess

    out = tmp_path / "bench"
    words = [sys.executable, "-m", "flowgrain", "bench", "--dry-run", "--out", str(out)]
    done = subprocess.run([*words, "--step", "machine"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| machine | done |" in done.stdout
    report = subprocess.run(
        [*words[:4], "--report", str(out), "--json"], capture_output=True, text=True
    )
    assert json.loads(report.stdout)["steps"][0]["status"] == "done"
    assert Path(out / "results.json").exists()
