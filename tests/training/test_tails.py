"""Approximate tails in training: fewer operations, the same stochastic steps. Compiled blocks."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import twins

from flowgrain import SettingsError, Trainer, load_config
from flowgrain.models import take
from flowgrain.training.step import update

ASIDE = Path(sys.prefix) / "aside"
BASE = {
    "method.group_size": 3,
    "method.granularities": [1, 2],
    "method.sde_steps": [0, 1],
    "sampling.num_steps": 8,
    "sampling.batch_size": 8,
    "training.prompts_per_step": 2,
    "training.max_steps": 2,
    "evaluation.rewards": [],
    "optimizer.learning_rate": 1e-3,
}


def config_of(changes=(), method="g2rpo"):
    return load_config(method, {**BASE, **dict(changes)})


@pytest.fixture
def torchao(monkeypatch):
    """torchao, which is installed into a separate directory."""
    monkeypatch.syspath_prepend(ASIDE)
    return pytest.importorskip("torchao")


def count_rows(trainer, place):
    """A list that gets the rows of every call of the feed-forward layer of block `place`."""
    rows = []
    layer = trainer.backbone.blocks[place].ff.net[0]
    layer.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    return rows


def updated(trainer, batch):
    """The metrics of an update with `batch`."""
    parts = (trainer.method, trainer.policy, trainer.optimizer)
    return update(trainer.config, *parts, batch, trainer.sigmas)


def differences(exact, approximate):
    """Maximum over trained edges and their parents, and mean over images."""
    rows = np.concatenate([exact.tree.edges, exact.tree.trained_parents])
    latents = (exact.rollout.at(rows) - approximate.rollout.at(rows)).abs().max()
    return latents, (exact.images - approximate.images).abs().mean()


def test_taylorseer_only_changes_tails(tmp_path):
    exact, cached = (
        Trainer(config_of({"sampling.tail_cache": kind}), tmp_path / kind[:4])
        for kind in ("none", "taylorseer:3")
    )
    exact_rows, cached_rows = count_rows(exact, 1), count_rows(cached, 1)
    before, after = exact.collector.collect(1), cached.collector.collect(1)
    assert sum(cached_rows) < 0.8 * sum(exact_rows)
    latents, images = differences(before, after)
    assert latents < 1e-4  # float32, in other batches
    assert 1e-6 < images < 0.05
    assert after.rollout.forward_passes == before.rollout.forward_passes
    assert after.rollout.batches >= before.rollout.batches
    # Nothing is cached from one rollout to the next.
    torch.testing.assert_close(cached.collector.collect(1).images, after.images)
    # The update uses the exact model, with gradient.
    cached_rows.clear()
    metrics = updated(cached, after)
    assert metrics["ratio/max"] == 1
    assert sum(cached_rows) == metrics["train_forward_passes"]


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("sd3", "taylorseer:2"),
        ("flux", "first_block:0.9"),
        *(
            pytest.param(name, "taylorseer:2", marks=pytest.mark.slow)
            for name in ("flux", "flux2", "qwen_image", "zimage")
        ),
        pytest.param("qwen_image", "first_block:0.9", marks=pytest.mark.slow),
    ],
)
def test_caches_of_every_backbone(tmp_path, name, cache):
    getattr(twins, name)(tmp_path / name)
    prompts = ["a red cat", "two dogs"]
    batches, rows = {}, {}
    settings = ("none", cache) if cache.startswith("taylor") else ("none", cache, "first_block:0.0")
    for setting in settings:
        config = config_of(
            {
                "model.name": name,
                "model.path": str(tmp_path / name),
                "model.height": 32,
                "model.width": 48,
                "model.max_prompt_tokens": 32,
                "model.embedding_cache": None,
                "runtime.dtype": "auto",
                "sampling.tail_cache": setting,
                "rewards": ["brightness"],
            }
        )
        trainer = Trainer(
            config,
            tmp_path / setting[-3:],
            prompts=prompts,
            eval_prompts=prompts,
            rewards={"brightness": lambda images, prompts: images.mean((1, 2, 3))},
        )
        modules = trainer.backbone.blocks[-1].named_modules()
        layer = next(m for n, m in modules if "att" in n and isinstance(m, torch.nn.Linear))
        count = rows[setting] = []
        layer.register_forward_hook(lambda _, args, __, count=count: count.append(len(args[0])))
        batches[setting] = trainer.collector.collect(1)
    exact, cached = batches["none"], batches[cache]
    assert sum(rows[cache]) < 0.8 * sum(rows["none"])
    for edges in (exact.tree.edges, exact.tree.trained_parents):
        torch.testing.assert_close(
            exact.rollout.at(edges), cached.rollout.at(edges), atol=1e-4, rtol=1e-4
        )
    if "first_block:0.0" in batches:  # This threshold caches nothing.
        images = batches["first_block:0.0"].images
        torch.testing.assert_close(images, exact.images, atol=1e-4, rtol=1e-4)


SHORT = {"method.granularities": [1], "method.sde_steps": [0], "sampling.num_steps": 3}


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora.rank": 2}, pytest.param({"runtime.dtype": "bfloat16"}, marks=pytest.mark.slow)],
    ids=["full", "lora", "bfloat16"],
)
def test_quantized_tails_follow_the_policy(tmp_path, torchao, changes):
    values = {**BASE, **SHORT}  # int8 is slow on a CPU
    rest = {"sampling.tail_weights": "int8", "optimizer.learning_rate": 1e-2}
    config = load_config("g2rpo", {**values, **changes, **rest})
    trainer = Trainer(config, tmp_path)
    texts = [trainer.prompts[0].text]
    cond = take(trainer.policy.encode(texts), torch.zeros(3).long())
    x, sigma = torch.randn(3, *trainer.backbone.latent_shape), torch.tensor([0.9, 0.5, 0.1])

    def error(trainer, expected):
        with trainer.collector.tails.open() as tail:
            v = tail(x, sigma, cond, 1.0, False).float()
        return float((v - expected).norm() / expected.norm())

    def exact():
        return trainer.policy.rollout_velocity(x, sigma, cond, 1.0).float()

    # Symmetric int8 per row has an error of about 0.7% here, or 1.4% with the reduced range of CPUs
    # without VNNI.
    first = exact()
    assert 0 < error(trainer, first) < 0.05
    copy = trainer.collector.tails.quantized
    assert type(copy.model.get_submodule(min(copy.layers)).weight).__name__ != "Parameter"
    for step in (1, 2):
        assert trainer.step(step)["updates/skipped"] == 0
    moved = float((exact() - first).norm() / first.norm())
    assert moved > 0.05
    assert error(trainer, exact()) < min(0.05, moved / 2)
    trainer.save(None)
    again = Trainer(config, tmp_path)
    again.restore()
    assert error(again, exact()) == pytest.approx(error(trainer, exact()), abs=1e-6)


def test_quantized_tails_change_no_stochastic_step(tmp_path, torchao):
    exact, quantized = (
        Trainer(
            config_of({"sampling.tail_weights": kind, "sampling.num_steps": 4}), tmp_path / kind
        )
        for kind in ("same", "int8")
    )
    latents, images = differences(exact.collector.collect(1), quantized.collector.collect(1))
    assert latents < 1e-4
    assert 1e-6 < images < 0.05


@pytest.mark.slow
def test_compiled_blocks(tmp_path):
    """aot_eager traces like inductor, and runs the traced operations unchanged."""
    torch._dynamo.reset()
    plain, compiled = (
        Trainer(config_of({"runtime.compile": kind}), tmp_path / str(kind))
        for kind in (None, "aot_eager")
    )
    for step in (1, 2):
        if step == 2:
            torch._dynamo.utils.counters.clear()
        a, b = plain.collector.collect(step), compiled.collector.collect(step)
        torch.testing.assert_close(a.images, b.images, atol=1e-3, rtol=1e-3)
        expected, metrics = updated(plain, a), updated(compiled, b)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert metrics["ratio/max"] == 1
    # A smaller last batch is compiled once and never again.
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
    assert (compiled.export() / "transformer" / "config.json").exists()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "g2rpo",
            {**BASE, "runtime.compile": "inductor", "sampling.tail_cache": "taylorseer:3"},
            "runtime.compile=inductor: sampling.tail_cache=taylorseer:3 changes the compiled",
        ),
        (
            "g2rpo",
            {"model.name": "zimage", "runtime.compile": "inductor", "rewards": ["clip"]},
            "runtime.compile=inductor: prompts of model.name=zimage have different lengths",
        ),
        *(
            ("dancegrpo", {name: value}, f"{name}={value}: has no effect, because only 1 step")
            for name, value in (("method.tail_order", 2), ("method.tail_ratio", 0.5))
        ),
        (
            "dancegrpo",
            {"sampling.tail_cache": "taylorseer:2"},
            "sampling.tail_cache=taylorseer:2: has no effect on a tail of 1 step",
        ),
        ("g2rpo", {**BASE, "sampling.tail_cache": "magic"}, "sampling.tail_cache"),
    ],
)
def test_settings_that_cannot_be_combined(method, changes, message):
    with pytest.raises(SettingsError, match=message):
        load_config(method, changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("method.tail_order", 2), ("method.tail_ratio", 0.5), ("sampling.tail_cache", "taylorseer:2")],
)
def test_settings_of_a_longer_tail(name, value):
    config = load_config("dancegrpo", {"method.sde_steps": [0, 1], name: value})
    section, option = name.split(".")
    assert getattr(getattr(config, section), option) == value


def test_tails_that_the_model_does_not_support(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    with pytest.raises(SettingsError, match=r"needs a GPU of compute capability 8\.9 .* not cpu"):
        Trainer(config_of({"sampling.tail_weights": "float8"}), tmp_path)
    with pytest.raises(SettingsError, match=r"first_block:0\.1: .* does not support SD3"):
        Trainer(config_of({"sampling.tail_cache": "first_block:0.1"}), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'flowgrain\[quantize\]'"):
        Trainer(config_of({"sampling.tail_weights": "int8"}), tmp_path)
