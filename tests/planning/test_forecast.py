"""The forecast: how time, transfers and memory depend on GPUs, links and layouts."""

import pytest

from flowgrain import SettingsError
from flowgrain.config import load_config
from flowgrain.planning.forecast import GPUS, forecast, forecast_rows
from flowgrain.planning.plan import prompt_cost


def test_gpus_and_layouts():
    config = load_config("flux/g2rpo")
    one, eight, sixteen = (forecast(config, n, "h200") for n in (1, 8, 16))
    assert one.seconds["sampling"] == pytest.approx(8 * eight.seconds["sampling"])
    assert one.seconds["sampling"] == pytest.approx(16 * sixteen.seconds["sampling"])
    assert sum(one.held.values()) == pytest.approx(214.2e9, rel=0.02)
    assert one.moved == {}
    assert eight.held["weights"] == one.held["weights"] / 8 == sixteen.held["weights"]
    assert "gradients between machines" in sixteen.moved
    assert "gradients between machines" not in eight.moved
    assert "141 GB, does not fit" in dict(forecast_rows(one, 1, "h200"))["memory in total"]


def test_sharded_rollouts_gather_the_parameters_for_every_call():
    replica = load_config("flux/g2rpo")
    sharded = replica.with_changes({"runtime.rollout_weights": "sharded", "sampling.batch_size": 1})
    found = forecast(sharded, 8, "h200")
    assert found.moved["rollout"] == 2 * 11_901_408_320 * 7 / 8 * 1708 * 2
    assert found.seconds["sampling"] >= forecast(replica, 8, "h200").seconds["sampling"]
    assert found.held["sampling copy"] < forecast(replica, 8, "h200").held["sampling copy"]


def test_an_adapter_moves_only_its_gradients():
    config = load_config("flux/g2rpo", preset="one-gpu")
    adapter = forecast(config, 8, "h100")
    assert set(adapter.moved) <= {"gradients"}
    assert sum(adapter.held.values()) < GPUS["h100"].memory / 3
    full = load_config("flux/g2rpo")
    checkpointed = full.with_changes({"model.gradient_checkpointing": False})
    assert (
        forecast(checkpointed, 1, "h200").seconds["update"]
        < (forecast(full, 1, "h200").seconds["update"])
    )


def test_true_cfg_doubles_the_rows():
    config = load_config("sd3/flow_grpo")
    assert config.sampling.guidance_scale > 1
    unguided = config.with_changes({"sampling.guidance_scale": 1.0})
    guided_time, time = (forecast(c, 1, "h100").seconds["sampling"] for c in (config, unguided))
    assert guided_time == pytest.approx(2 * time)
    embedded = load_config("flux/g2rpo")
    rows = prompt_cost(embedded).forward_passes * embedded.training.prompts_per_step
    found = forecast(embedded, 1, "h200")
    assert found.seconds["sampling"] == pytest.approx(rows * found.flops_of_pass / (0.5 * 989e12))


def test_unknown_gpus_and_models():
    with pytest.raises(
        SettingsError, match=r"--gpu h10: there is no such GPU\. Did you mean 'h100'"
    ):
        forecast(load_config("flux/g2rpo"), 8, "h10")
    with pytest.raises(SettingsError, match="Use flux or sd3"):
        forecast(load_config("demo"), 8, "h200")


def test_context_parallelism_has_no_forecast():
    config = load_config("flux/g2rpo", {"runtime.context_parallel": 2})
    with pytest.raises(SettingsError, match=r"^runtime\.context_parallel=2: the forecast cannot"):
        forecast(config, 8, "h200")
