"""The update reuses graphs of the rollout: the same gradient with fewer forward passes."""

import gc
import os
import signal
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import PROMPTS, Toy, red

from flowgrain import Interrupted, SettingsError, Trainer, load_config
from flowgrain.data import keyed_noise
from flowgrain.models.shapes import ShapesBackbone
from flowgrain.planning.plan import prompt_cost
from flowgrain.training.errors import Diverged
from flowgrain.training.graphs import GraphReuse, GraphSize, graph_bytes
from flowgrain.training.policy_gradient import PolicyGradientLoss
from flowgrain.training.rollout_batch import MicroBatch
from flowgrain.training.step import update

BASE = {
    "sampling.num_steps": 4,
    "method.group_size": 4,
    "method.updates_per_rollout": 1,
    "training.prompts_per_step": 3,
    "training.max_steps": 2,
    "training.graph_memory": "all",
    "evaluation.every": 0,
    "evaluation.rewards": [],
    "runtime.threads": 1,
}


def make(folder, method="g2rpo", changes=(), backbone=None):
    """A run of the bundled model. Its adapter, if there is one, is not at its start."""
    config = load_config(method, {**BASE, **dict(changes)})
    trainer = Trainer(config, folder, backbone=backbone)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.policy.parameters.values() if config.lora.rank else ():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return trainer


def toy(folder, changes=(), method="flow_grpo"):
    config = load_config(method, {**BASE, "optimizer.learning_rate": 1e-2, **dict(changes)})
    return Trainer(
        config,
        folder,
        backbone=Toy(),
        prompts=PROMPTS,
        eval_prompts=PROMPTS,
        rewards={"red": red},
    )


def losses_of(trainer, batch):
    parts = (trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    losses = PolicyGradientLoss(*parts)
    losses.prepare()
    return losses


def gradient(trainer, losses):
    """The gradient of the only update, as one vector."""
    (share,) = losses.updates
    for place in range(len(share.micro_batches)):
        terms = losses.terms(0, place)
        assert (terms["ratio"] == 1).all()
        trainer.optimizer.backward(terms["loss"].sum() / share.count)
    found = [p.grad.flatten() for p in trainer.policy.parameters.values() if p.grad is not None]
    trainer.optimizer.adamw.zero_grad(set_to_none=True)
    return torch.cat(found)


def updated(trainer, batch):
    parts = (trainer.method, trainer.policy, trainer.optimizer)
    return update(trainer.config, *parts, batch, trainer.sigmas)


class Embedded(ShapesBackbone):
    """A backbone like FLUX.1-dev: the guidance scale is an input."""

    embedded_guidance = True


CASES = {
    "flow_grpo": ("flow_grpo", {}),
    "g2rpo": ("g2rpo", {"method.granularities": [1, 2]}),
    "mixgrpo": ("mixgrpo", {"method.window_size": 2}),
    "dancegrpo": ("dancegrpo", {"method.best_of": 2}),
    "squared error": ("flow_grpo_fast", {"method.window_size": 2}),
    "lora": ("flow_grpo", {"lora.rank": 4}),
    "lora, KL": ("mixgrpo", {"method.window_size": 2, "lora.rank": 4, "method.kl_weight": 0.1}),
    "KL": ("g2rpo", {"method.kl_weight": 0.1}),
    "true CFG": ("g2rpo", {"sampling.guidance_scale": 2.0, "lora.rank": 4}),
    "embedded guidance": ("g2rpo", {"sampling.guidance_scale": 3.5}),
    "chunks": ("flow_grpo", {"sampling.prompts_per_chunk": 2, "sampling.batch_size": 7}),
    "checkpointing": ("flow_grpo", {"lora.rank": 4}),
    "bfloat16": ("g2rpo", {"runtime.dtype": "bfloat16"}),
    "bfloat16 lora": ("g2rpo", {"runtime.dtype": "bfloat16", "lora.rank": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_a_second_forward_pass(tmp_path, case):
    """On the same latents: to the bit in the same micro-batches, otherwise up to rounding."""
    method, changes = CASES[case]
    backbone = Embedded.load() if case == "embedded guidance" else None
    trainer = make(tmp_path, method, changes, backbone)
    if case == "checkpointing":
        trainer.policy.model.enable_gradient_checkpointing()
    batch = trainer.collector.collect(1)
    rows = [np.sort(graph.rows) for graph in batch.rollout.graphs]
    assert np.sort(np.concatenate(rows)).tolist() == batch.tree.trained_parents.tolist()
    reused = gradient(trainer, losses_of(trainer, batch))
    assert not batch.rollout.graphs
    assert reused.norm() > 0
    again = losses_of(trainer, batch)
    again.updates[0].micro_batches[:] = [MicroBatch(part, True) for part in rows]
    found = gradient(trainer, again)
    # In chunks of 7 rows, a call has rows of several noise levels in the order of the rollout. The
    # update sorts them, and sums over rows round differently. Measured: 1.3e-7.
    assert torch.equal(reused, found) or case == "chunks"
    assert (reused - found).norm() <= 1e-6 * found.norm()
    # Micro-batches of 128 rows. Measured: 1.3e-6 in float32.
    other = gradient(trainer, losses_of(trainer, batch))
    tolerance = 2e-2 if "bfloat16" in case else 4e-6
    assert (reused - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_velocity_of_the_loss_is_the_velocity_that_sampled(tmp_path, dtype, rank):
    """The latents of trained edges are the transitions of the loss plus their noise, to the bit."""
    trainer = make(tmp_path, "g2rpo", {"runtime.dtype": dtype, "lora.rank": rank})
    batch = trainer.collector.collect(1)
    losses = losses_of(trainer, batch)
    noise = keyed_noise(trainer.backbone.latent_shape, "train", 0, 1)
    for place, micro_batch in enumerate(losses.updates[0].micro_batches):
        kept = losses._velocities[place]
        transition, edges, _ = losses._transition(micro_batch.rows, None, kept)
        tree = batch.rollout.tree
        sampled = transition.sample(noise(tree.prompt[edges], tree.draw[edges]))
        assert torch.equal(sampled.detach(), batch.rollout.at(edges))
        ratio = losses.terms(0, place)["ratio"]
        assert torch.equal(ratio, torch.ones_like(ratio))


def test_latents_only_change_where_other_rows_share_a_call(tmp_path):
    """A batch of trained parents is one call as before. In float32, its latents are the same."""
    changes = {"training.graph_memory": 0, "lora.rank": 4}
    for method, equal in (("flow_grpo", True), ("g2rpo", False)):
        plain = make(tmp_path / f"{method}0", method, changes).collector.collect(1)
        reused = make(tmp_path / method, method, {"lora.rank": 4}).collector.collect(1)
        assert not plain.rollout.graphs
        assert torch.equal(reused.rollout.latents, plain.rollout.latents) or not equal
        torch.testing.assert_close(reused.images, plain.images, atol=1e-5, rtol=0)
        torch.testing.assert_close(reused.advantage, plain.advantage, atol=1e-3, rtol=0)


def test_bfloat16_samples_trained_rows_with_autocast(tmp_path):
    """A full fine-tune samples other rows with a bfloat16 copy, which rounds differently."""
    changes = {"runtime.dtype": "bfloat16"}
    reused = make(tmp_path / "a", "flow_grpo", changes).collector.collect(1)
    plain = make(tmp_path / "b", "flow_grpo", {**changes, "training.graph_memory": 0.0})
    difference = (reused.images - plain.collector.collect(1).images).abs()
    assert 0 < difference.mean() < 0.02


def test_float16_scales_the_loss_of_reused_graphs(tmp_path):
    norms = []
    for dtype, memory in (("float16", "all"), ("float32", 0.0)):
        changes = {"runtime.dtype": dtype, "training.graph_memory": memory, "lora.rank": 4}
        metrics = make(tmp_path / dtype, "g2rpo", changes).step(1)
        assert metrics["updates/skipped"] == 0
        norms.append(metrics["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_bytes_of_a_graph_of_the_toy_network(tmp_path):
    """Saved are the 8 inputs and the 16 hidden values of a row. Its 6 results also exist."""
    trainer = toy(tmp_path)
    size = GraphReuse(trainer.config, trainer.policy)
    size.budget()  # no limit, nothing is measured
    assert size._size is None
    trainer.policy.encode(["zero"])
    assert size._measure() == GraphSize(0, 4 * (8 + 16 + 6))


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora.rank": 4}, {"sampling.guidance_scale": 2.0}, {"runtime.dtype": "bfloat16"}],
)
def test_the_measured_size_predicts_larger_calls(tmp_path, changes):
    trainer = make(tmp_path, "g2rpo", changes)
    policy, guidance = trainer.policy, trainer.config.sampling.guidance_scale
    cond = policy.encode(["three green circles"] * 5)
    size = GraphReuse(trainer.config, policy)._measure()
    x, sigma = torch.randn(5, 4, 8, 8), torch.linspace(0.1, 0.9, 5)
    found = graph_bytes(policy.model, lambda: policy.train_velocity(x, sigma, cond, guidance))
    assert size.of_call + 5 * size.of_row == pytest.approx(found, rel=0.01)
    # In bfloat16, a graph of a full fine-tune contains a copy of the weights.
    weights = sum(p.numel() for p in policy.model.parameters())
    if "runtime.dtype" in changes:
        assert 0.5 < size.of_call / (2 * weights) < 1.1
    else:
        assert size.of_call < 0.1 * size.of_row


def test_gradient_checkpointing_makes_graphs_smaller(tmp_path):
    trainer = make(tmp_path)
    trainer.policy.encode(["three green circles"])
    reuse = GraphReuse(trainer.config, trainer.policy)
    plain = reuse._measure()
    trainer.policy.model.enable_gradient_checkpointing()
    assert reuse._measure().of_row < 0.2 * plain.of_row


@given(st.integers(0, 999), st.integers(0, 999), st.integers(0, 10**6), st.integers(1, 200))
def test_rows_fit_and_one_more_would_not(of_call, of_row, left, limit):
    size = GraphSize(of_call, of_row)
    rows = size.rows_in(left, limit)
    assert 0 <= rows <= limit
    assert not rows or of_call + rows * of_row <= left
    assert rows == limit or of_call + (rows + 1) * of_row > left


ROW = 120
"""Bytes of the graph of a row of the toy network."""


@pytest.mark.parametrize(
    ("memory", "changes", "reused"),
    [
        (0.0, {}, 0),
        (20 * ROW / 1e9, {}, 20),
        (20.5 * ROW / 1e9, {"sampling.prompts_per_chunk": 1}, 20),  # 12 rows of a prompt
        (0.9 * ROW / 1e9, {}, 0),
        (1.0, {}, 36),
        ("all", {"training.micro_batch_size": 5}, 36),
    ],
)
def test_as_many_rows_as_fit_are_reused(tmp_path, memory, changes, reused):
    """Four chains of three prompts have 36 trained parents. The weights are the same."""
    trainer = toy(tmp_path / "a", {"training.graph_memory": memory, **changes})
    plain = toy(tmp_path / "b", {"training.graph_memory": 0.0})
    rows, calls = [], []
    train_velocity = trainer.policy.train_velocity

    def counted(x, *rest):
        rows.append(len(x))
        calls.append(torch.is_grad_enabled())
        return train_velocity(x, *rest)

    trainer.policy.train_velocity = counted
    batch = trainer.collector.collect(1)
    sampled = list(rows)
    metrics, expected = updated(trainer, batch), updated(plain, plain.collector.collect(1))
    if memory and memory != "all":
        assert sampled[:2] == [1, 2]  # the measurement
        sampled = sampled[2:]
    assert all(calls)
    assert sum(sampled) == reused
    assert max(sampled, default=0) <= trainer.config.micro_batch_size
    assert metrics.get("reused_forward_passes", 0) == reused
    assert ("reused_forward_passes" in metrics) == bool(memory)
    assert metrics["train_forward_passes"] == 36 - reused
    assert sum(rows) - sum(sampled) - (3 if memory and memory != "all" else 0) == 36 - reused
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, value in plain.policy.parameters.items():
        torch.testing.assert_close(trainer.policy.parameters[name], value, atol=1e-6, rtol=0)


def test_the_plan_counts_reused_passes(tmp_path):
    trainer = make(tmp_path, "mixgrpo", {"method.window_size": 2, "method.kl_weight": 0.1})
    cost, metrics = prompt_cost(trainer.config), trainer.step(1)
    assert (cost.train_forward_passes, cost.reused_forward_passes) == (0, 5)
    for name in ("forward_passes", "train_forward_passes", "frozen_forward_passes"):
        assert metrics[name] == 3 * getattr(cost, name)
    assert metrics["reused_forward_passes"] == 3 * cost.reused_forward_passes
    without = prompt_cost(trainer.config.with_changes({"training.graph_memory": 8.0}))
    assert (without.train_forward_passes, without.reused_forward_passes) == (5, 0)
    assert without.passes - cost.passes == 5  # one forward pass per trained parent


@pytest.mark.parametrize("memory", [20 * ROW / 1e9, "all"])
def test_resumed_equals_uninterrupted(tmp_path, memory):
    changes = {"training.graph_memory": memory, "training.max_steps": 4}
    changes |= {"training.checkpoint_every": 2, "sampling.batch_size": 5}
    whole = toy(tmp_path / "whole", changes)
    lines = whole.train()
    first = toy(tmp_path / "cut", changes)

    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(stop)
    again = toy(tmp_path / "cut", changes)
    again.resume()
    resumed = again.train()
    for name, value in whole.policy.parameters.items():
        assert torch.equal(again.policy.parameters[name], value)
    for a, b in zip(lines, resumed, strict=True):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {
            k: v for k, v in b.items() if "seconds" not in k
        }


@pytest.fixture
def watched(monkeypatch):
    """Weak references to the velocities whose graphs are kept."""
    from flowgrain.core import graphs

    found, graph = [], graphs.Graph

    def watch(rows, velocity):
        found.append(weakref.ref(velocity))
        return graph(rows, velocity)

    monkeypatch.setattr(graphs, "Graph", watch)
    return found


def alive(references):
    gc.collect()
    return [reference() for reference in references if reference() is not None]


def test_a_step_frees_its_graphs(tmp_path, watched):
    trainer = toy(tmp_path)
    batch = trainer.collector.collect(1)
    assert len(alive(watched)) == 3
    losses = losses_of(trainer, batch)
    counts = []
    for place in range(3):
        trainer.optimizer.backward(losses.terms(0, place)["loss"].sum())
        counts.append(len(losses._velocities))
    assert counts == [2, 1, 0]
    assert not alive(watched)
    trainer.step(2)
    assert not alive(watched)


def test_a_signal_frees_the_graphs_of_an_abandoned_step(tmp_path, watched):
    """Between rollout and update. They are free although the exception is still referenced."""
    trainer = toy(tmp_path)

    def stopped(images, prompts):
        os.kill(os.getpid(), signal.SIGTERM)
        return red(images, prompts)

    trainer.rewards["red"] = stopped
    before = [p.detach().clone() for p in trainer.policy.parameters.values()]
    with pytest.raises(Interrupted, match="stopped after step 0") as error:
        trainer.train()
    assert error.value.__context__ is not None
    assert len(watched) == 3
    assert not alive(watched)
    after = trainer.policy.parameters.values()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_images_that_are_not_finite(tmp_path):
    trainer = toy(tmp_path)
    velocity = trainer.policy.train_velocity
    trainer.policy.train_velocity = lambda *inputs: velocity(*inputs) * float("nan")
    with pytest.raises(Diverged):
        trainer.step(1)
    assert trainer.policy.updates == 0


def test_an_update_that_is_skipped_frees_its_graphs(tmp_path, watched):
    trainer = toy(tmp_path)
    batch = trainer.collector.collect(1)
    batch.advantage[0] = float("nan")
    metrics = updated(trainer, batch)
    assert metrics["updates/skipped"] == 1
    assert not alive(watched)
    assert updated(trainer, trainer.collector.collect(2))["updates/skipped"] == 0


def test_a_calibration_keeps_no_graph(tmp_path, watched):
    changes = {"method.calibration.rounds": 1, "method.calibration.samples": 2}
    trainer = toy(tmp_path, changes, "densegrpo")
    trainer.calibrate()
    assert not watched
    parents = trainer.config.tree().trained_parents
    assert trainer.step(1)["reused_forward_passes"] == 3 * len(parents)


@pytest.mark.slow
def test_compiled_blocks(tmp_path):
    """Calls are padded to training.micro_batch_size. The budget counts padded rows."""
    changes = {"runtime.compile": "aot_eager", "training.micro_batch_size": 8}
    compiled = make(tmp_path / "a", "g2rpo", {**changes, "training.graph_memory": 1.0})
    plain = make(tmp_path / "b", "g2rpo", {"training.graph_memory": 0.0})
    found, expected = compiled.step(1), plain.step(1)
    assert found["reused_forward_passes"] == expected["train_forward_passes"]
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    size = compiled.collector.graph_reuse._size
    assert size.of_row == 0
    assert size.rows_in(size.of_call, 8) == 8


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (
            "diffusionnft",
            {},
            "training.graph_memory=2: method 'diffusionnft' does not train the steps",
        ),
        ("refl", {}, "training.graph_memory=2: method 'refl' does not train the steps"),
        ("flow_grpo", {}, "training.graph_memory=2: with method.updates_per_rollout=2, the first"),
        ("e_grpo", {}, "with method.updates_per_rollout=per_step, the first update changes"),
        (
            "g2rpo",
            {"model.name": "zimage", "rewards": ["clip"]},
            "training.graph_memory=2: prompts of model.name=zimage have different lengths",
        ),
    ],
)
def test_combinations_without_effect_are_refused(source, changes, message):
    with pytest.raises(SettingsError) as error:
        load_config(source, {"training.graph_memory": 2, **changes})
    assert message in str(error.value)
    assert "Use " in str(error.value)


def test_every_length_of_a_prompt_can_be_reused_without_limit():
    changes = {"model.name": "zimage", "model.path": "x", "rewards": ["clip"]}
    config = load_config("g2rpo", {"training.graph_memory": "all", **changes})
    assert config.training.graph_memory == "all"


@pytest.mark.parametrize("value", [-1, "some", float("nan"), 1e9, True])
def test_wrong_values(value):
    with pytest.raises(SettingsError, match=r"^training\.graph_memory"):
        load_config("g2rpo", {"training.graph_memory": value})
