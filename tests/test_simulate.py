"""The forecast: FLOPs against a count by hand, and how it goes with cards, links and strategies."""

import pytest

from flowgrain import SettingsError, recipe
from flowgrain.planning.forecast import GPUS, flops_of_pass, forecast, told


def test_flops_by_hand():
    """FLUX.1-dev at 720x720 with 512 words: 12 d^2 weights a stream and block, two FLOPs a weight and token, and attention."""
    d, image, words = 3072, 45 * 45, 512
    double, single = 19 * 12 * d**2, 38 * 12 * d**2
    by_hand = 2 * (double * (image + words) + single * (image + words)) + 4 * 57 * d * (image + words) ** 2
    flops, parameters, adapter = flops_of_pass(recipe("flux_g2rpo_lora"))
    assert flops == pytest.approx(by_hand, rel=0.02)
    assert parameters == 11_901_408_320
    assert adapter == 52_297_728  # what peft makes of it at rank 32


def test_cards_and_strategies():
    s = recipe("flux_g2rpo")
    one, eight, sixteen = (forecast(s, n, "h200") for n in (1, 8, 16))
    assert (
        one.seconds["sampling"] == pytest.approx(8 * eight.seconds["sampling"]) == pytest.approx(16 * sixteen.seconds["sampling"])
    )
    assert sum(one.held.values()) == pytest.approx(214.2e9, rel=0.001)
    assert one.moved == {}
    assert eight.held["weights"] == one.held["weights"] / 8 == sixteen.held["weights"]
    assert "gradients between machines" in sixteen.moved
    assert "gradients between machines" not in eight.moved
    # As published: one row a call through sharded weights, an all-gather each.
    published = forecast(s.model_copy(update={"rollout_weights": "sharded", "rows_per_pass": 1}), 8, "h200")
    assert published.moved["rollout"] == 2 * 11_901_408_320 * 7 / 8 * 1708 * 2
    assert published.seconds["sampling"] >= eight.seconds["sampling"]
    adapter = forecast(recipe("flux_g2rpo_lora"), 8, "h100")
    assert set(adapter.moved) == {"gradients"} or not adapter.moved
    assert sum(adapter.held.values()) < GPUS["h100"].memory / 3
    assert "141 GB, does not fit" in dict(told(one, 1, "h200"))["held in all"]


def test_what_is_not_known():
    with pytest.raises(SettingsError, match="--gpu b300: is not known; known: a100"):
        forecast(recipe("flux_g2rpo"), 8, "b300")
    with pytest.raises(SettingsError, match="flux and sd3 are"):
        forecast(recipe("demo"), 8, "h200")
