"""A rollout against itself and against cheaper ones."""

import numpy as np
import pytest

from flowgrain import SettingsError
from flowgrain.evaluation.fidelity import fidelity
from flowgrain.config.schema import settings

SMALL = {"num_steps": 6, "group_size": 4, "prompts_per_step": 2, "eval_rewards": (), "rewards": "towers"}


def test_a_rollout_ranks_as_it_does():
    s = settings({"method": "g2rpo", "granularities": (1,), **SMALL})
    found = fidelity(s, s, 1)
    assert found.correlation == pytest.approx(np.ones(len(found.correlation)))
    assert len(found.correlation) == 2 * 3
    assert (found.flipped, found.passes) == (0, 1)


def test_a_cheaper_one_costs_less_and_ranks_less_well():
    full = settings({"method": "mixgrpo", "window_size": 2, **SMALL})
    short = settings({"method": "mixgrpo", "window_size": 2, **SMALL, "tail_ratio": 0.5})
    shorter = settings({"method": "mixgrpo", "window_size": 2, **SMALL, "tail_ratio": 0.2})
    some, more = fidelity(full, short, 2), fidelity(full, shorter, 2)
    assert more.passes < some.passes < 1
    assert np.mean(more.correlation) < np.mean(some.correlation) + 0.05 <= 1.05


def test_the_cheap_side_has_the_tails_it_asks_for():
    s = settings({"method": "g2rpo", "granularities": (1,), **SMALL})
    cheap = fidelity(s, s.model_copy(update={"tail_cache": "taylorseer:4"}), 1)
    assert cheap.passes == 1
    assert 0.5 < np.mean(cheap.correlation) < 1 - 1e-6


def test_what_cannot_be_compared():
    full = settings({"method": "mixgrpo", "window_size": 2, **SMALL})
    with pytest.raises(SettingsError, match="do not train the same edges"):
        fidelity(full, settings({"method": "mixgrpo", "window_size": 3, **SMALL}), 1)
    with pytest.raises(SettingsError, match="--cheap method=flow_grpo: a cheaper rollout is of the same policy"):
        fidelity(full, settings({"method": "flow_grpo", **SMALL}), 1)
