"""Rollouts in worker processes give the same numbers as the training process.

Most tests run the workers in this process, behind the interface of `Cluster`. Ray itself is used
where processes are started and killed.
"""

import json
import os
import pickle
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy import Toy, red

from flowgrain import METHODS, Interrupted, SettingsError, Trainer, load_config
from flowgrain.planning.doctor import examine
from flowgrain.planning.plan import prompt_cost
from flowgrain.training import checkpoint
from flowgrain.training.errors import RunStopped
from flowgrain.training.policy_gradient import PolicyGradientLoss
from flowgrain.training.rollouts import cluster, workers
from flowgrain.training.rollouts.checks import import_ray
from flowgrain.training.rollouts.cluster import other_gpus, ray_options
from flowgrain.training.rollouts.source import LocalRollouts
from flowgrain.training.rollouts.worker import RolloutWorker, worker_settings
from flowgrain.training.signals import StopRequested

ASIDE = Path(sys.prefix) / "ray"
"""Where Ray is installed for the tests."""
SMALL = {
    "sampling.num_steps": 4,
    "sampling.prompts_per_chunk": 1,
    "method.group_size": 2,
    "optimizer.learning_rate": 1e-3,
    "training.prompts_per_step": 3,
    "training.max_steps": 2,
    "training.record.prompts": 0,
    "evaluation.every": 0,
    "evaluation.rewards": [],
    "runtime.threads": 1,
}
OPTIONS = {
    "g2rpo": {"method.granularities": [1]},
    "branchgrpo": {"method.split_steps": [0, 1], "method.group_size": 4},
    "densegrpo": {"method.calibration.rounds": 1, "method.calibration.samples": 2},
    "e_grpo": {"method.sde_steps": [0, 1], "method.merged_steps": [1, 2]},
    "flow_grpo_fast": {"method.window_size": 2},
    "mixgrpo": {"method.window_size": 2, "method.window_interval": 1},
    "mixgrpo_flash": {"method.window_size": 2, "method.window_interval": 1},
    "mixgrpo_flash_star": {"method.window_size": 2, "method.window_interval": 1},
}
"""Options that fit four steps."""
WORKERS = {"rollout.workers": 2}
STALE = {"rollout.workers": 2, "rollout.max_staleness": 1}
SAMPLED = list(METHODS)


class LocalCluster:
    """The interface of `Cluster` with the workers in this process. Everything is pickled."""

    def __init__(self, config, device):
        settings = pickle.loads(pickle.dumps(worker_settings(config)))
        self.workers = [RolloutWorker(settings, 1) for _ in range(config.rollout.workers)]
        self.processes = [worker.process() for worker in self.workers]

    def submit(self, requests, parameters):
        results = []
        for worker, request in zip(self.workers, requests, strict=True):
            values = pickle.loads(pickle.dumps((request, dict(parameters))))
            results.append(pickle.dumps(worker.sample(*values)))
        return results

    def results(self, calls, check):
        check()
        return [pickle.loads(call) for call in calls]

    def close(self):
        self.workers = []


@pytest.fixture
def in_process(monkeypatch):
    """Workers in this process."""
    monkeypatch.setattr(workers, "Cluster", LocalCluster)
    monkeypatch.setitem(sys.modules, "ray", object())


def settings(method="g2rpo", **changes):
    return load_config(method, {**SMALL, **OPTIONS.get(method, {}), **changes})


def train(folder, method="g2rpo", **changes):
    trainer = Trainer(settings(method, **changes), folder)
    trainer.resume()
    trainer.train()
    return trainer


def lines(folder):
    """The lines of metrics.jsonl without durations."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


def tensors(folder):
    """The tensors of the last checkpoint."""
    last = checkpoint.checkpoints(folder / "checkpoints")[-1]
    return load_file(next(last.glob("*.safetensors")))


def assert_same(a, b):
    assert lines(a) == lines(b)
    found, expected = tensors(a), tensors(b)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ------------------------------------------------------------------------------ exact mode
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (
            "g2rpo",
            {"sampling.guidance_scale": 2.0, "lora.rank": 2, "sampling.decode_batch_size": 3},
        ),
        ("diffusionnft", {"optimizer.learning_rate": 1e-2}),
    ],
)
def test_workers_change_no_number(tmp_path, in_process, method, changes):
    train(tmp_path / "none", method, **changes)
    train(tmp_path / "two", method, **changes, **WORKERS)
    assert_same(tmp_path / "two", tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_quantized_tails_of_workers_follow_the_parameters(tmp_path, in_process, monkeypatch, rank):
    monkeypatch.syspath_prepend(Path(sys.prefix) / "aside")
    pytest.importorskip("torchao")
    changes = {"method.sde_steps": [0], "sampling.tail_weights": "int8", "lora.rank": rank}
    train(tmp_path / "none", "flow_grpo", **changes)
    train(tmp_path / "two", "flow_grpo", **changes, **WORKERS)
    assert_same(tmp_path / "two", tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora.rank": 2}])
@pytest.mark.parametrize("method", SAMPLED)
def test_workers_change_no_number_of_any_method(tmp_path, in_process, method, changes):
    test_workers_change_no_number(tmp_path, None, method, changes)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("method", ["g2rpo", "diffusionnft"])
def test_workers_change_no_number_in_bfloat16(tmp_path, in_process, method, rank):
    changes = {"runtime.dtype": "bfloat16", "lora.rank": rank}
    test_workers_change_no_number(tmp_path, None, method, changes)


@given(st.data())
def test_every_worker_gets_consecutive_chunks(data):
    chunks = data.draw(st.integers(1, 200))
    number = data.draw(st.integers(1, chunks))
    parts = workers.shares(chunks, number)
    assert [i for first, end in parts for i in range(first, end)] == list(range(chunks))
    sizes = [end - first for first, end in parts]
    assert len(sizes) == number
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1


# ------------------------------------------------------------------------------ stale mode
class OlderRollouts(LocalRollouts):
    """The training process samples step k + 1 with the parameters before update k."""

    def __init__(self, collector):
        super().__init__(collector)
        self.before = {}

    def score(self, step, prompts, tree):
        policy = self.collector.policy
        self.before[step] = {n: p.detach().clone() for n, p in policy.parameters.items()}
        older = self.before[max(step - 1, 1)]
        with policy.replaced(older):
            scored = super().score(step, prompts, tree)
        return replace(scored, sampled_with=older if step > 1 else None)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora.rank": 2, "method.updates_per_rollout": 2}])
def test_stale_rollouts_are_those_of_the_parameters_before_the_update(
    tmp_path, in_process, monkeypatch, changes
):
    changes = {**changes, "training.max_steps": 3}
    train(tmp_path / "workers", **changes, **STALE)
    trainer = Trainer(settings(**changes), tmp_path / "older")
    trainer.collector.source = OlderRollouts(trainer.collector)
    trainer.train()
    found, expected = lines(tmp_path / "workers"), lines(tmp_path / "older")
    assert [line.pop("staleness") for line in found] == [0, 1, 1]
    assert found == expected
    planned = prompt_cost(settings(**changes, **STALE)).frozen_forward_passes
    assert [line["frozen_forward_passes"] for line in found[1:]] == [3 * planned] * 2
    for name, value in tensors(tmp_path / "older").items():
        assert torch.equal(tensors(tmp_path / "workers")[name], value), name


def test_ratio_of_stale_rollouts_is_exactly_1_if_no_parameter_changes(tmp_path, in_process):
    train(tmp_path, **{**STALE, "optimizer.learning_rate": 1e-30, "training.max_steps": 3})
    found = lines(tmp_path)
    assert [line["staleness"] for line in found] == [0, 1, 1]
    assert all(line["ratio/mean"] == line["ratio/max"] == 1 for line in found)


def test_ratio_is_taken_against_the_parameters_that_sampled(tmp_path):
    trainer = Trainer(settings(), tmp_path)
    policy, method = trainer.policy, trainer.method
    batch = trainer.collector.collect(1)
    sampled_with = {n: p.detach().clone() for n, p in policy.parameters.items()}

    def log_probs(loss):
        rows = loss.updates[0].micro_batches[0].rows
        with torch.no_grad():
            transition, edges, _ = loss._transition(rows, policy.train_velocity)
        return transition.log_prob(batch.rollout.at(edges))

    loss = PolicyGradientLoss(trainer.config, method, policy, batch, trainer.sigmas)
    old = log_probs(loss)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(1e-2 * torch.randn(p.shape, generator=generator))
    batch = replace(batch, sampled_with=sampled_with)
    loss = PolicyGradientLoss(trainer.config, method, policy, batch, trainer.sigmas)
    changed = {n: p.detach().clone() for n, p in policy.parameters.items()}
    loss.prepare()
    assert all(torch.equal(p, changed[n]) for n, p in policy.parameters.items())
    ratio = loss.terms(0, 0)["ratio"].detach()
    expected = (log_probs(loss) - old).exp()
    assert float((expected - 1).abs().max()) > 1e-3
    torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ resuming
@pytest.mark.slow
@pytest.mark.parametrize("mode", [WORKERS, STALE])
@pytest.mark.parametrize("step", [1, 2])
def test_resumed_equals_uninterrupted(tmp_path, in_process, mode, step):
    train(tmp_path / "whole", **{**mode, "training.max_steps": 3})
    train(tmp_path / "cut", **{**mode, "training.max_steps": step})
    assert any("sampled_with" in name for name in tensors(tmp_path / "cut")) == (mode == STALE)
    train(tmp_path / "cut", **{**mode, "training.max_steps": 3})
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_a_stop_while_the_workers_sample_is_resumed_exactly(tmp_path, in_process, monkeypatch):
    changes = {**STALE, "training.max_steps": 3}
    train(tmp_path / "whole", **changes)
    calls = []

    def stop(self, pending, check):
        calls.append(1)
        if len(calls) == 3:
            raise StopRequested(signal.SIGTERM)
        return results(self, pending, check)

    results = LocalCluster.results
    monkeypatch.setattr(LocalCluster, "results", stop)
    with pytest.raises(Interrupted, match="stopped after step 2"):
        train(tmp_path / "cut", **changes)
    train(tmp_path / "cut", **changes)
    assert_same(tmp_path / "cut", tmp_path / "whole")


# ------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("g2rpo", {"rollout.max_staleness": 1}, r"max_staleness=1: has no effect without workers"),
        ("g2rpo", {"rollout.address": "auto"}, r"address=auto: has no effect without workers"),
        ("g2rpo", {"rollout.workers": 4}, r"workers=4: .* are 3 chunks .* Use rollout.workers=3"),
        (
            "g2rpo",
            {**WORKERS, "sampling.prompts_per_chunk": None},
            r"workers=2: .* are 1 chunk .*sampling.prompts_per_chunk=1",
        ),
        ("diffusionnft", STALE, r"max_staleness=1: method 'diffusionnft' has no importance ratio"),
        ("draft", {**STALE, "rewards": [{"name": "towers"}]}, r"max_staleness=1: method 'draft'"),
        ("sft", {**WORKERS, "data.images": "x.jsonl"}, r"workers=2: has no effect with data"),
        (
            "g2rpo",
            {**WORKERS, "runtime.context_parallel": 2},
            r"workers=2: not possible together with runtime.context_parallel=2",
        ),
        (
            "g2rpo",
            {**WORKERS, "sampling.explore.candidates": 9},
            r"workers=2: not possible together with sampling.explore.candidates=9",
        ),
        (
            "flow_grpo",
            {**WORKERS, "method.group_size": 4, "training.adaptive_groups.probe": 2},
            r"workers=2: not possible together with training.adaptive_groups.probe=2",
        ),
        (
            "g2rpo",
            {**WORKERS, "training.graph_memory": "all"},
            r"workers=2: not possible together with training.graph_memory=all",
        ),
    ],
)
def test_settings_without_effect_are_refused(method, changes, message):
    options = {k: v for k, v in SMALL.items() if method != "sft" or not k.startswith("method")}
    with pytest.raises(SettingsError, match=message):
        load_config(method, {**options, **changes})


def test_workers_that_cannot_start_leave_no_run_behind(tmp_path, in_process, monkeypatch):
    def refuse(config, device):
        raise SettingsError("no cluster")

    with monkeypatch.context() as patch:
        patch.setattr(workers, "Cluster", refuse)
        with pytest.raises(SettingsError, match="no cluster"):
            Trainer(settings(**WORKERS), tmp_path).train()
    Trainer(settings(**WORKERS), tmp_path).train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_several_training_processes_are_refused(tmp_path, in_process, monkeypatch):
    config = settings(**WORKERS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="torchrun started 2"):
        Trainer(config, tmp_path)


@pytest.mark.parametrize("name", ["rewards", "backbone"])
def test_objects_from_python_are_refused(tmp_path, in_process, name):
    objects = {"rewards": {"red": red}, "backbone": Toy()}
    config = settings(**WORKERS)
    with pytest.raises(SettingsError, match=f"cannot use the argument {name}"):
        Trainer(config, tmp_path, **{name: objects[name]})


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"pip install 'flowgrain\[ray\]'"):
        Trainer(settings(**WORKERS), tmp_path)


def test_the_doctor_starts_no_workers(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(workers, "Cluster", None)
    findings = examine(settings(**WORKERS), tmp_path)
    assert all(finding.ok for finding in findings)


def test_an_error_of_a_worker_does_not_wait_for_the_others():
    """The second call never ends."""
    several, asked = cluster.Cluster.__new__(cluster.Cluster), []

    class FakeRay:
        class exceptions:  # noqa: N801  (the name in Ray)
            RayError = RuntimeError

        def wait(self, calls, num_returns, timeout):
            asked.append(list(calls))
            return [call for call in calls if call != "slow"], ["slow"]

        def get(self, calls):
            if "broken" in calls:
                raise RuntimeError("no reward")
            return [call.upper() for call in calls]

    several.ray = FakeRay()
    with pytest.raises(RunStopped, match=r"a rollout worker failed: .*no reward"):
        several.results(["broken", "slow"], lambda: None)
    assert several.results(["b", "a"], lambda: None) == ["B", "A"]
    assert asked == [["broken", "slow"], ["b", "a"]]


def test_workers_use_the_gpus_that_do_not_train():
    assert other_gpus(None, 3) == ["1", "2"]
    assert other_gpus("4, 5,7", 3) == ["5", "7"]
    assert other_gpus("2", 1) == []


# ------------------------------------------------------------------------------ Ray
REWARD = """
import os, signal
from pathlib import Path
from flowgrain import register_reward

DEADLY = Path({marker!r})

@register_reward("deadly")
class Deadly:
    def __call__(self, images, prompts):
        if DEADLY.exists():  # the first call kills its process
            DEADLY.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return images.mean((1, 2, 3))


@register_reward("broken")
class Broken:
    def __init__(self):
        if os.environ.get("RAY_JOB_ID"):
            raise OSError("no such file: weights.bin")

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine with two CPUs, as `Cluster` starts it."""
    with pytest.MonkeyPatch.context() as patch:
        if ASIDE.is_dir():
            patch.syspath_prepend(str(ASIDE))
            paths = [str(ASIDE), os.environ.get("PYTHONPATH", "")]
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of a cluster that is not to be used
        config = settings(**WORKERS)
        try:
            ray = import_ray(config)
        except SettingsError as error:
            pytest.skip(str(error))
        ray.init(**ray_options(config))
        yield ray
        ray.shutdown()


@pytest.fixture
def plugin(tmp_path):
    """A file with the rewards, and the file whose existence makes `deadly` kill its process."""
    marker, file = tmp_path / "marker", tmp_path / "rewards_of_test.py"
    file.write_text(REWARD.format(marker=str(marker)))
    return {"runtime.plugins": [str(file)]}, marker


@pytest.mark.slow
def test_ray_listens_on_this_machine_only(ray):
    assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"


@pytest.mark.slow
def test_a_message_says_that_the_start_waits(ray, monkeypatch, caplog):
    monkeypatch.setattr(cluster, "_START_SECONDS", 0)
    started = cluster.Cluster(settings(**WORKERS), torch.device("cpu"))
    started.close()
    assert "0 of 2 rollout workers have started" in caplog.text
    assert "CPUs and 0 GPUs" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_the_prompts_of_a_killed_worker_are_sampled_again(
    tmp_path, ray, plugin, staleness, monkeypatch, caplog
):
    changes, marker = plugin
    changes |= {"rewards": [{"name": "deadly"}], "training.max_steps": 3}
    mode = {"rollout.workers": 1, "rollout.max_staleness": staleness}
    marker.touch()
    train(tmp_path / "killed", **changes, **mode)
    assert not marker.exists()
    assert "was restarted" in caplog.text
    monkeypatch.setattr(workers, "Cluster", LocalCluster)
    train(tmp_path / "undisturbed", **changes, **mode)
    assert_same(tmp_path / "killed", tmp_path / "undisturbed")
    if not staleness:
        train(tmp_path / "none", **changes)
        assert_same(tmp_path / "killed", tmp_path / "none")


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_a_settings_error(tmp_path, ray, plugin):
    changes, _ = plugin
    with pytest.raises(SettingsError, match=r"could not be started: .*OSError: no such file"):
        train(tmp_path / "run", **changes, rewards=[{"name": "broken"}], **{"rollout.workers": 1})
