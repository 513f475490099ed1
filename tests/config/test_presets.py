"""The preset one-gpu fits any recipe to one GPU with 80 GB."""

import pytest

from flowgrain import SettingsError, load_config
from flowgrain.config.load import recipe_names
from flowgrain.config.presets import apply_preset
from flowgrain.config.sections import LoraConfig

LARGE = [name for name in recipe_names() if "/" in name]


@pytest.mark.parametrize("name", LARGE)
def test_one_gpu_is_a_lora_in_small_batches(name):
    plain, config = load_config(name), load_config(name, preset="one-gpu")
    lora = plain.lora if plain.lora.rank else LoraConfig(rank=32)
    assert config.lora == lora
    assert config.training.micro_batch_size == 1
    assert config.sampling.batch_size == (4 if config.model.name == "flux" else 16)
    assert config.sampling.prompts_per_chunk == 4
    assert config.model.gradient_checkpointing
    devices = [r.options.get("device") for r in (*config.rewards, *config.evaluation.rewards)]
    assert "cuda" not in devices
    assert config.reward_weights == plain.reward_weights
    # Everything else is that of the recipe.
    assert config.method == plain.method
    assert config.sampling.num_steps == plain.sampling.num_steps
    assert config.sampling.guidance_scale == plain.sampling.guidance_scale
    assert config.training.prompts_per_step == plain.training.prompts_per_step
    published = plain.method.learning_rates.lora
    assert config.learning_rate == (published or 1e-4)


def test_overrides_come_after_the_preset():
    words = ["lora.rank=8", "sampling.batch_size=2", "optimizer.learning_rate=5e-5"]
    config = load_config("flux/g2rpo", words, preset="one-gpu")
    assert (config.lora.rank, config.sampling.batch_size) == (8, 2)
    assert config.optimizer.learning_rate == 5e-5


def test_rewards_that_are_only_evaluated_run_on_the_cpu_too():
    rewards = [{"name": "pickscore", "device": "cuda:1"}, "oracle"]
    source = {"method": {"name": "g2rpo"}, "evaluation": {"rewards": rewards}}
    values = apply_preset("one-gpu", source)
    assert values["evaluation"]["rewards"] == [{"name": "pickscore", "device": "cpu"}, "oracle"]
    assert rewards[0]["device"] == "cuda:1"  # not changed in place


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(SettingsError) as error:
        load_config("demo", preset="one-gpus")
    assert str(error.value) == (
        "--preset one-gpus: there is no such preset. Did you mean 'one-gpu'?"
    )
