"""A rollout compared with itself and with cheaper ones."""

import numpy as np
import pytest

from flowgrain import SettingsError
from flowgrain.config import load_config
from flowgrain.planning.fidelity import check_comparable, fidelity

SMALL = {
    "sampling.num_steps": 6,
    "method.group_size": 4,
    "training.prompts_per_step": 2,
    "evaluation.rewards": [],
    "rewards": ["towers"],
}
G2RPO = load_config("g2rpo", {**SMALL, "method.granularities": [1]})
MIXGRPO = load_config("mixgrpo", {**SMALL, "method.window_size": 2})


def test_a_rollout_ranks_as_itself():
    found = fidelity(G2RPO, G2RPO, 1)
    assert found.correlation == pytest.approx(np.ones(2 * 3))
    assert (found.flipped, found.passes) == (0, 1)
    assert found.to_dict()["spearman"] == pytest.approx(1)


def test_shorter_tails_cost_less_and_rank_less_well():
    short, shorter = (MIXGRPO.with_changes({"method.tail_ratio": r}) for r in (0.5, 0.2))
    some, more = fidelity(MIXGRPO, short, 2), fidelity(MIXGRPO, shorter, 2)
    assert more.passes < some.passes < 1
    assert np.mean(more.correlation) < np.mean(some.correlation) < 1


def test_the_cheap_rollout_has_its_own_tails():
    cheap = fidelity(G2RPO, G2RPO.with_changes({"sampling.tail_cache": "taylorseer:4"}), 1)
    assert cheap.passes == 1
    assert 0.5 < np.mean(cheap.correlation) < 1 - 1e-6


def test_another_method_that_trains_the_same_edges():
    flash = load_config("mixgrpo_flash", {**SMALL, "method.window_size": 2})
    found = fidelity(MIXGRPO, flash, 1)
    assert found.passes < 1
    assert len(found.correlation)


def test_a_method_that_trains_on_images():
    full = load_config("diffusionnft", {**SMALL, "method.tail_order": 1})
    found = fidelity(full, full.with_changes({"method.tail_order": 2}), 1)
    assert len(found.correlation) == 2
    assert found.passes == 1
    assert 0 < np.mean(found.correlation) < 1


def test_rollouts_that_cannot_be_compared():
    with pytest.raises(SettingsError, match="do not train the same edges"):
        check_comparable(MIXGRPO, MIXGRPO.with_changes({"method.window_size": 3}), 1)
    with pytest.raises(SettingsError, match="do not train the same edges"):
        check_comparable(MIXGRPO, load_config("flow_grpo", SMALL), 1)
    with pytest.raises(
        SettingsError, match=r"--cheap sampling.num_steps=5: both rollouts must use"
    ):
        check_comparable(MIXGRPO, MIXGRPO.with_changes({"sampling.num_steps": 5}), 1)
    with pytest.raises(SettingsError, match=r"--cheap lora.rank=2"):
        check_comparable(MIXGRPO, MIXGRPO.with_changes({"lora.rank": 2}), 1)


def test_a_window_that_moves_differently_is_found_in_a_later_step():
    slow = MIXGRPO.with_changes({"method.window_interval": 1})
    check_comparable(MIXGRPO, slow, 1)
    with pytest.raises(SettingsError, match="do not train the same edges"):
        check_comparable(MIXGRPO, slow, 2)
