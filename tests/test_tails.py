"""Cheaper tails: fewer operations, the same stochastic steps; and compiled blocks, the same images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import twins

from flowgrain import Run, SettingsError
from flowgrain.models import take
from flowgrain.training.policy import Policy
from flowgrain.config.schema import Settings, settings

ASIDE = Path(sys.prefix) / "aside"
MORE = {"num_steps": 8, "sde_steps": (0, 1), "granularities": (1, 2), "rows_per_pass": 8, "learning_rate": 1e-3}


def changed(s: Settings, **changes) -> Settings:
    return settings({**s.model_dump(), **MORE, **changes})


@pytest.fixture
def torchao(monkeypatch):
    """torchao, from where the Makefile has put it aside."""
    monkeypatch.syspath_prepend(ASIDE)
    return pytest.importorskip("torchao")


def calls(run: Run, place: int) -> list[int]:
    """The rows of every call of the feed-forward part of block `place` from now on."""
    found = []
    run.backbone.blocks[place].ff.net[0].register_forward_hook(lambda _, args, __: found.append(len(args[0])))
    return found


def distances(full, cheap):
    """The most by which trained edges and their parents differ, and the mean by which images do."""
    rows = np.concatenate([full.whole.edges, full.whole.trained_parents])
    return (full.result.at(rows) - cheap.result.at(rows)).abs().max(), (full.images - cheap.images).abs().mean()


def test_taylorseer_in_the_tails_alone(tiny, tmp_path):
    full, cheap = (Run(changed(tiny, tail_cache=kind), tmp_path / kind[:4]) for kind in ("none", "taylorseer:3"))
    of_full, of_cheap = calls(full, 1), calls(cheap, 1)
    before, after = full.sample_tree(1), cheap.sample_tree(1)
    assert sum(of_cheap) < 0.8 * sum(of_full)
    stochastic, images = distances(before, after)
    assert stochastic < 1e-4  # fp32, batched differently
    assert 1e-6 < images < 0.05
    assert after.result.forward_passes == before.result.forward_passes
    assert after.result.batches >= before.result.batches
    torch.testing.assert_close(cheap.sample_tree(1).images, after.images)  # nothing is kept from one rollout to the next
    # The update is the full model's again, and takes a gradient through it.
    of_cheap.clear()
    metrics = cheap.update(after)
    assert metrics["ratio/max"] == 1
    assert sum(of_cheap) == metrics["train_forward_passes"]


@pytest.mark.parametrize(
    ("model", "cache"),
    [(model, "taylorseer:2") for model in ("sd3", "flux", "flux2", "qwen_image", "zimage")]
    + [(model, "first_block:0.9") for model in ("flux", "qwen_image")],
)
def test_caches_of_every_backbone(tmp_path, model, cache):
    getattr(twins, model)(tmp_path / model)
    base = {
        "model": model, "weights": str(tmp_path / model), "height": 32, "width": 48, "max_prompt_tokens": 32, "group_size": 3,
        "prompts_per_step": 2, "eval_rewards": (), "rewards": "brightness", **MORE,
    }  # fmt: skip
    prompts = ["a red cat", "two dogs"]
    found, rows = {}, {}
    for kind in ("none", cache, "first_block:0.0"):
        if kind == "first_block:0.0" and cache.startswith("taylor"):
            continue
        rewards = {"brightness": lambda images, prompts: images.mean((1, 2, 3))}
        run = Run(
            settings({**base, "tail_cache": kind}), tmp_path / kind[-3:], prompts=prompts, eval_prompts=prompts, rewards=rewards
        )
        last = run.backbone.blocks[-1].named_modules()
        attention = next(module for name, module in last if "att" in name and isinstance(module, torch.nn.Linear))
        rows[kind] = []
        attention.register_forward_hook(lambda _, args, __, of_kind=rows[kind]: of_kind.append(len(args[0])))
        found[kind] = run.sample_tree(1)
    full, cheap = found["none"], found[cache]
    assert sum(rows[cache]) < 0.8 * sum(rows["none"])
    for edges in (full.whole.edges, full.whole.trained_parents):
        torch.testing.assert_close(full.result.at(edges), cheap.result.at(edges), atol=1e-4, rtol=1e-4)
    if "first_block:0.0" in found:  # which keeps nothing
        torch.testing.assert_close(found["first_block:0.0"].images, full.images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"dtype": "bfloat16"}, {"method": "diffusionnft"}])
def test_quantised_tails_follow_the_policy(tiny, tmp_path, torchao, changes):
    if changes.get("method"):
        kept = {k: v for k, v in tiny.model_dump().items() if k in ("eval_rewards", "prompts_per_step", "eval_prompts")}
        s = settings({**kept, **changes, "num_steps": 4, "group_size": 3, "learning_rate": 1e-2, "tail_weights": "int8"})
    else:
        short = {"num_steps": 3, "sde_steps": (0,), "granularities": (1,)}  # a CPU multiplies int8 slowly
        s = changed(tiny, tail_weights="int8", **changes, **short, learning_rate=1e-2)
    run = Run(s, tmp_path)
    policy = run.policy
    cond = policy.encode(run.prompts[:1])
    x, sigma, cond = torch.randn(3, *run.backbone.latent_shape), torch.tensor([0.9, 0.5, 0.1]), take(cond, torch.zeros(3).long())

    def difference(policy: Policy, expected: torch.Tensor) -> float:
        with policy.tail() as tail:
            found = tail(x, sigma, cond, 1.0, False).float()
        return float((found - expected).norm() / expected.norm())

    def whole() -> torch.Tensor:
        return (policy.sample_velocity if policy.old is None else policy.old_velocity)(x, sigma, cond, 1.0).float()

    # Symmetric int8 per row has an error of about 0.7% here, or 1.4% with the reduced range of CPUs without VNNI.
    first = whole()
    assert 0 < difference(policy, first) < 0.05
    assert type(policy.quantised.model.get_submodule(min(policy.quantised.layers)).weight).__name__ != "Parameter"
    for step in (1, 2):
        assert run.step(step)["updates/skipped"] == 0
    moved = float((whole() - first).norm() / first.norm())
    assert moved > 0.05
    assert difference(policy, whole()) < min(0.05, moved / 2)
    run.save(None)
    again = Run(s, tmp_path)
    again.steps_done = 0
    again.restore()
    assert difference(again.policy, whole()) == pytest.approx(difference(policy, whole()), abs=1e-6)


def test_int8_products_are_exact_in_the_reduced_range():
    """The range that is used where products saturate: -64..63 is exact with every kernel."""
    for value in (-64, 63):
        a, b = torch.full((8, 64), value, dtype=torch.int8), torch.full((64, 8), value, dtype=torch.int8)
        assert torch.equal(torch._int_mm(a, b), a.int() @ b.int())


def test_quantised_tails_change_no_stochastic_step(tiny, tmp_path, torchao):
    full, cheap = (Run(changed(tiny, tail_weights=kind, num_steps=4), tmp_path / kind) for kind in ("same", "int8"))
    stochastic, images = distances(full.sample_tree(1), cheap.sample_tree(1))
    assert stochastic < 1e-4
    assert 1e-6 < images < 0.05


def test_compiled_blocks(tiny, tmp_path):
    """aot_eager traces as inductor does, and runs what it traced as it is."""
    torch._dynamo.reset()
    plain, compiled = (Run(changed(tiny, compile=kind), tmp_path / str(kind)) for kind in (None, "aot_eager"))
    for step in (1, 2):
        if step == 2:
            torch._dynamo.utils.counters.clear()
        a, b = plain.sample_tree(step), compiled.sample_tree(step)
        torch.testing.assert_close(a.images, b.images, atol=1e-3, rtol=1e-3)
        found = [run.update(one) for run, one in ((plain, a), (compiled, b))]
        assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-3)
        assert found[1]["ratio/max"] == 1
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")  # a ragged pass is compiled once and never again
    exported = compiled.export()
    assert (exported / "transformer" / "config.json").exists()


def test_what_cannot_be_cheaper(tiny, monkeypatch, tmp_path):
    with pytest.raises(SettingsError, match="compile=inductor: tail_cache=taylorseer:3 changes the blocks"):
        changed(tiny, compile="inductor", tail_cache="taylorseer:3")
    with pytest.raises(SettingsError, match="compile=inductor: prompts of model=zimage keep their own lengths"):
        settings({"model": "zimage", "compile": "inductor"})
    for name, value in (("tail_order", 2), ("tail_ratio", 0.5), ("tail_cache", "taylorseer:2")):
        with pytest.raises(SettingsError, match=f"{name}={value} means nothing where only 1 of the steps comes after"):
            settings({"method": "dancegrpo", name: value})
        settings({"method": "dancegrpo", "sde_steps": (0, 1), name: value})
    with pytest.raises(SettingsError, match=r"tail_cache='magic'.*none, first_block:THRESHOLD"):
        changed(tiny, tail_cache="magic")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(SettingsError, match=r"tail_weights=float8: needs a GPU of compute capability 8\.9 or more, not cpu"):
        Run(changed(tiny, tail_weights="float8"), tmp_path)
    with pytest.raises(SettingsError, match=r"tail_cache=first_block:0\.1: diffusers' cache does not fit the blocks of SD3"):
        Run(changed(tiny, tail_cache="first_block:0.1"), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'flowgrain\[quantize\]'"):
        Run(changed(tiny, tail_weights="int8"), tmp_path)
