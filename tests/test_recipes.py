"""The recipes of real models: their docstrings tell what a plan finds, and each takes two steps on its model's tiny twin."""

import importlib
import re

import pytest
import torch
import twins

from flowgrain import Run, recipe
from flowgrain.methods.algorithms import METHODS, build, changes_with_step, price
from flowgrain.methods.calibration import calibration_price
from flowgrain.config.recipes import DEFAULT, bundled
from flowgrain.config.schema import Settings

REAL = [name for name in bundled() if name != DEFAULT]
PROMPTS = ["a red cat", "two blue dogs", "a green bird"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    twins.sd3(root / "sd3", with_t5=False, clip_tokens=8)
    twins.flux(root / "flux")
    return root


def test_every_method_on_both_models():
    assert set(REAL) == {f"{model}_{method}{way}" for model in ("flux", "sd35") for method in METHODS for way in ("", "_lora")}


@pytest.mark.parametrize("name", [name for name in REAL if not name.endswith("_lora")])
def test_docstrings_tell_the_cost(name):
    s = recipe(name)
    told = " ".join((importlib.import_module(f"flowgrain.config.recipes.{name}").__doc__ or "").split())
    assert f"flowgrain train {name} prompts=" in told
    assert "Hardware: " in told
    assert f"`{name}_lora`" in told
    assert "Expected: " in told
    found = re.search(r"Cost of a prompt( in the mean)?: ([\d,.]+) sampling passes, ([\d,.]+) with gradient, (\d+) decodes", told)
    steps = range(1, s.max_steps + 1) if changes_with_step(s) else [1]
    costs = [price(build(s), s, step) for step in steps]
    passes, gradient = (sum(getattr(c, n) for c in costs) / len(costs) for n in ("forward_passes", "train_forward_passes"))
    assert [float(x.replace(",", "")) for x in found.groups()[1:]] == [round(passes, 1), round(gradient, 1), costs[0].decodes]
    assert f"{s.prompts_per_step} prompts a step, {s.max_steps:,} steps" in told
    calibration = calibration_price(s).forward_passes
    assert (f"Calibration before the first step: {calibration:,} passes." in told) == bool(calibration)


def test_one_gpu_is_an_adapter_in_small_passes():
    for name in REAL:
        s: Settings = recipe(name)
        if name.endswith("_lora"):
            assert s.lora_rank == 32
            assert s.train_rows_per_pass == 1
            assert s.reward_device == "cpu"
            whole = recipe(name.removesuffix("_lora"))
            assert (s.method, s.num_steps, s.group_size, s.guidance_scale) == (
                whole.method,
                whole.num_steps,
                whole.group_size,
                whole.guidance_scale,
            )
        assert s.gradient_checkpointing


def brightness(images, prompts):
    return images.mean((1, 2, 3)) + images[:, 0].std((1, 2))


@pytest.mark.parametrize("name", REAL)
def test_two_steps_on_the_tiny_twin(folders, tmp_path, name):
    """All as the recipe has it but the model, the reward, the prompts a step, how long psi is calibrated, and fp32 for bf16."""
    model = recipe(name).model
    small = {"weights": str(folders / model), "height": 8, "width": 8, "max_prompt_tokens": 16, "dtype": "float32"}
    short = {
        "max_steps": 2,
        "prompts_per_step": 1,
        "eval_every": 0,
        "reward_device": "cpu",
        "embedding_cache": str(tmp_path / "kept"),
    }
    calibration = {"calibration_rounds": 1, "calibration_samples": 2} if name.startswith(("flux_dense", "sd35_dense")) else {}
    s = recipe(name, **small, **short, **calibration, rows_per_pass=128, train_rows_per_pass=16)
    run = Run(s, tmp_path / "run", rewards={"brightness": brightness}, prompts=PROMPTS, eval_prompts=PROMPTS)
    before = {n: p.detach().clone() for n, p in run.policy.trained.items()}
    metrics = [run.step(1), run.step(2)]
    assert all(line["grad_norm"] > 0 and line["updates/skipped"] == 0 for line in metrics)
    assert metrics[0]["forward_passes"] == price(build(s), s).forward_passes
    assert any(not torch.equal(p, before[n]) for n, p in run.policy.trained.items())
