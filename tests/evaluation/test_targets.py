"""Models: what words name, and that exports and runs contain the same model."""

import shutil

import pytest
import torch

from flowgrain import Trainer, load_config
from flowgrain.evaluation import base_config, find_targets, load_target
from flowgrain.settings import SettingsError
from flowgrain.training.evaluate import sample_images


def sampled(word, overrides=None, **given):
    """An image by the model that `word` names."""
    (target,) = find_targets([str(word)])
    config = base_config([target], overrides or {})
    policy, config = load_target(target, config, overrides or {}, **given)
    return sample_images(policy, config, ["two red circles"], 3, seed=5)


def test_exports_contain_the_model_of_the_run(trained):
    base = sampled("base")
    for name, part, atol in (("full", "transformer", 0.0), ("lora", "lora", 1e-6)):
        run = sampled(trained / name)
        assert (run - base).abs().max() > 1e-4
        export = trained / name / "export"
        torch.testing.assert_close(sampled(export), run, atol=atol, rtol=0)
        torch.testing.assert_close(sampled(export / part), run, atol=atol, rtol=0)
    file = next((trained / "lora" / "export" / "lora").glob("*.safetensors"))
    torch.testing.assert_close(sampled(file), sampled(trained / "lora"), atol=1e-6, rtol=0)


def test_a_run_is_the_model_that_its_trainer_evaluates(trained):
    """EMA parameters, bit for bit, without the copies of training."""
    for name in ("full", "lora"):
        (target,) = find_targets([str(trained / name)])
        policy, config = load_target(target, base_config([target], {}), {})
        assert policy.sampler is policy.model
        assert policy.reference is None
        assert policy.ema is None
        trainer = Trainer(config, trained / name)
        trainer.restore()
        images = sample_images(trainer.policy, config, ["two red circles"], 3, seed=5)
        torch.testing.assert_close(sampled(trained / name), images, atol=0, rtol=0)


def test_only_one_copy_in_the_compute_dtype(trained):
    overrides = {"runtime": {"dtype": "bfloat16"}}
    for word in ("base", trained / "lora" / "export"):
        (target,) = find_targets([str(word)])
        policy, _ = load_target(target, base_config([target], overrides), overrides)
        assert policy.sampler is policy.model
        dtypes = {p.dtype for n, p in policy.model.named_parameters() if "lora" not in n}
        assert dtypes == {torch.bfloat16}


def test_a_run_without_a_checkpoint_is_its_base_model(tmp_path):
    trainer = Trainer(load_config("g2rpo"), tmp_path / "new")
    trainer.recorder.start()
    assert find_targets([str(tmp_path / "new")])[0].checkpoint is None
    torch.testing.assert_close(sampled(tmp_path / "new"), sampled("base"))


def test_models_with_the_same_name_get_distinct_labels(trained, tmp_path):
    for place in ("x/run", "y/run", "x-run"):
        shutil.copytree(trained / "full", tmp_path / place)
    targets = find_targets([str(tmp_path / place) for place in ("x/run", "y/run", "x-run")])
    assert len({target.label for target in targets}) == 3
    (export,) = find_targets([str(tmp_path / "x/run/export/transformer")])
    assert export.label == "run"


def test_the_lora_of_another_model(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    file = next((trained / "lora" / "export" / "lora").glob("*.safetensors"))
    state = load_file(file)
    renamed = {
        name.replace("transformer_blocks.0", "transformer_blocks.9"): value
        for name, value in state.items()
    }
    save_file(renamed, tmp_path / "a.safetensors")
    save_file(
        {**state, "text_encoder.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors"
    )
    for name, message in (("a", "cannot be loaded into this model"), ("b", "text encoder")):
        with pytest.raises(SettingsError, match=message):
            sampled(tmp_path / f"{name}.safetensors")


def test_settings_of_a_backbone():
    """The demo's settings for its own model, the model's defaults for another one."""
    demo = load_config("demo")
    config = base_config(find_targets(["base"]), {})
    assert config.evaluation == demo.evaluation
    assert config.rewards == demo.rewards
    flux = base_config(find_targets(["flux"]), {"sampling": {"guidance_scale": 2.0}})
    assert [reward.name for reward in flux.rewards] == ["hps", "clip"]
    assert (flux.model.width, flux.eval_guidance) == (720, 2.0)
    by_override = base_config(find_targets(["base"]), {"model": {"name": "flux"}})
    assert by_override.model == flux.model


def test_settings_of_the_first_run(trained):
    targets = find_targets(["base", str(trained / "full")])
    assert base_config(targets, {}).training.ema_decay == 0.5
    assert base_config(targets, {"sampling": {"batch_size": 3}}).sampling.batch_size == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "nowhere"], "nowhere: there is no such model. .* shapes"),
        (["base", "base"], "base: named twice"),
    ],
)
def test_words_without_a_model(words, message):
    with pytest.raises(SettingsError, match=message):
        find_targets(words)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"sampling": {"num_steps": 5}},
            r"sampling.num_steps=5: the run .* was trained with sampling.num_steps=4",
        ),
        ({"runtime": {"dtype": "bfloat16"}}, r"runtime.dtype=bfloat16: the run"),
        ({"model": {"height": 64}}, r"model.height=64: the run"),
    ],
)
def test_settings_that_a_run_keeps(trained, overrides, message):
    with pytest.raises(SettingsError, match=message):
        sampled(trained / "full", overrides)
