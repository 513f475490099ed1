"""The rule for an alarm, as a function of two evaluations."""

import numpy as np
import pytest

from flowgrain.config.watch import WatchConfig
from flowgrain.monitors import MONITORS
from flowgrain.training.alarms import Measured, differences, find, why_not_comparable

COUNT = 64
NOISE = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
PROMPTS = [f"prompt {i}" for i in range(COUNT)]


def measured(scores, monitors, **changes):
    values = {"prompts": PROMPTS, "num_steps": 8, "guidance": 1.0, **changes}
    return Measured(scores=scores, monitors=monitors, **values)


BASE = measured({"mine": NOISE, "other": NOISE}, {"dark": 0.3 + 0.1 * NOISE, "path_kl": 0 * NOISE})


def moved(mine=0.0, other=0.0, dark=0.0, path_kl=0.0, **changes):
    """The evaluation of a policy that changed every image by the same amount, nearly."""
    noise = 1e-3 * NOISE[::-1]
    return measured(
        {"mine": NOISE + mine + noise, "other": NOISE + other + noise},
        {"dark": 0.3 + 0.1 * NOISE + dark + noise, "path_kl": np.full(COUNT, path_kl)},
        **changes,
    )


def names(now, base=BASE, **rule):
    found = find(base, now, {"mine": 1.0}, WatchConfig(threshold=0.5, reward_threshold=0.5, **rule))
    return [(finding.monitor, finding.direction) for finding in found]


def test_a_monitor_that_is_worse_while_the_trained_reward_rises():
    assert names(moved(mine=1, dark=0.1)) == [("dark", "up")]
    (finding,) = find(BASE, moved(mine=1, dark=0.1), {"mine": 1.0}, WatchConfig(threshold=0.5))
    assert finding.difference == pytest.approx(0.1, abs=1e-3)
    assert finding.low < finding.difference < finding.high
    assert finding.threshold == pytest.approx(0.05 * NOISE.std(ddof=1), rel=1e-3)


def test_no_alarm():
    assert names(moved(mine=1)) == []
    assert names(moved(mine=1, dark=0.04)) == []  # less than half a standard deviation
    assert names(moved(mine=1, dark=-0.1)) == []  # better
    assert names(moved(mine=0, dark=0.1)) == []  # the trained reward did not rise
    assert names(moved(mine=1, dark=0.1), monitor=("other",)) == []


def test_a_reward_that_is_not_trained():
    assert names(moved(mine=1, other=-1)) == [("other", "down")]
    assert names(moved(mine=1, other=1)) == []
    assert names(moved(mine=1, other=-1), monitor=("dark",)) == []


def test_directions():
    assert names(moved(mine=1, dark=-0.1), direction="down") == [("dark", "down")]
    assert names(moved(mine=1, dark=0.1), direction="down") == []
    both = moved(mine=1, dark=-0.2, other=1)
    assert names(both, direction="change") == [("dark", "down"), ("other", "up")]


def test_a_monitor_without_spread_is_compared_in_its_own_unit():
    assert not MONITORS["path_kl"].spread
    assert names(moved(mine=1, path_kl=0.6)) == [("path_kl", "up")]
    assert names(moved(mine=1, path_kl=0.4)) == []


def test_the_largest_excess_comes_first():
    assert names(moved(mine=1, dark=0.1, other=-3)) == [("other", "down"), ("dark", "up")]
    assert names(moved(mine=1, dark=0.3, other=-1)) == [("dark", "up"), ("other", "down")]


def test_the_smallest_spread_that_counts():
    """Without dark pixels before training, a few dark pixels are no alarm."""
    bright = measured(BASE.scores, {"dark": 0 * NOISE})
    few = measured(moved(mine=1).scores, {"dark": np.full(COUNT, 0.004)})
    many = measured(moved(mine=1).scores, {"dark": np.full(COUNT, 0.01)})
    assert names(few, bright) == []
    assert names(many, bright) == [("dark", "up")]


def test_the_change_must_be_significant():
    """The mean is far beyond the threshold, but comes from two images."""
    scores, dark = moved(mine=1).scores, 0.3 + 0.1 * NOISE
    dark[:2] += 10
    assert dark.mean() - BASE.monitors["dark"].mean() > 3 * 0.05
    assert names(measured(scores, {"dark": dark})) == []


def test_the_level_is_divided_by_the_number_of_monitors():
    """False alarms of an unchanged model with threshold 0: at most 5% of evaluations."""
    rng, alarms, repetitions = np.random.default_rng(1), 0, 400
    rule, columns = WatchConfig(threshold=0, direction="change"), [*MONITORS]
    base = measured({"mine": NOISE}, dict.fromkeys(columns, NOISE))
    for _ in range(repetitions):
        now = measured(
            {"mine": NOISE + 1},
            {name: NOISE + rng.normal(size=COUNT) for name in columns},
        )
        alarms += bool(find(base, now, {"mine": 1.0}, rule))
    # Without the division about a third of the evaluations would raise an alarm.
    assert 0.02 < alarms / repetitions < 0.08


def test_several_trained_rewards_count_with_their_weights():
    now = moved(mine=1, other=-3, dark=0.1)
    rule = WatchConfig(threshold=0.5)
    assert find(BASE, now, {"mine": 1.0, "other": 1.0}, rule) == []
    assert [f.monitor for f in find(BASE, now, {"mine": 4.0, "other": 1.0}, rule)] == ["dark"]
    assert [f.monitor for f in find(BASE, now, {"mine": -1.0, "other": -1.0}, rule)] == ["dark"]


def test_a_trained_reward_that_is_not_evaluated_leaves_the_monitors():
    rule = WatchConfig(threshold=1.5)
    assert find(BASE, moved(dark=0.1), {"pairs": 1.0}, rule) == []
    found = find(BASE, moved(dark=0.2), {"pairs": 1.0}, rule)
    assert [f.monitor for f in found] == ["dark"]


def test_missing_values_are_left_out():
    now = moved(mine=1, dark=0.1)
    now.monitors["dark"][5:] = np.nan
    found = differences(BASE, now)
    assert found["dark"].mean == pytest.approx(0.1, abs=1e-2)
    now.monitors["dark"][1:] = np.nan
    assert names(now) == []
    assert np.isnan(differences(BASE, now)["dark"].low)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 4}, "evaluation.num_steps was 8 before training and is 4"),
        ({"guidance": 3.5}, "evaluation.guidance_scale was 1 before training and is 3.5"),
        ({"prompts": ["x"] * COUNT}, "the evaluation prompts have changed"),
    ],
)
def test_other_evaluations_are_not_compared(changes, message):
    now = moved(mine=1, dark=0.5, **changes)
    assert why_not_comparable(BASE, now) == message
    assert names(now) == []
    assert differences(BASE, now) == {}


def test_only_pairs_of_the_same_prompt_are_compared():
    """A resumed run has other prompts in half of the places, and fewer images."""
    now = moved(mine=1, dark=0.1)
    now.monitors["dark"][10:] = 5.0
    prompts = [*PROMPTS[:10], *["another"] * 20]
    cut = Measured(
        prompts,
        8,
        1.0,
        {name: values[:30] for name, values in now.scores.items()},
        {name: values[:30] for name, values in now.monitors.items()},
    )
    assert differences(BASE, cut)["dark"].mean == pytest.approx(0.1, abs=1e-2)


def test_all_leaves_out_the_norm_of_latents_unless_it_is_named():
    base = measured({"mine": NOISE}, {"latent_norm": NOISE})
    now = measured({"mine": NOISE + 1}, {"latent_norm": NOISE[::-1] + 9})
    assert find(base, now, {"mine": 1.0}, WatchConfig()) == []
    (finding,) = find(base, now, {"mine": 1.0}, WatchConfig(monitor=["latent_norm"]))
    assert finding.monitor == "latent_norm"


def test_a_reward_has_a_threshold_of_its_own():
    worse = moved(mine=1, other=-0.5)
    (finding,) = find(BASE, worse, {"mine": 1.0}, WatchConfig())
    assert (finding.monitor, finding.direction, finding.threshold) == ("other", "down", 0)
    assert find(BASE, worse, {"mine": 1.0}, WatchConfig(reward_threshold=2.0)) == []
