"""The sliding window: positions by hand, and random positions."""

import pytest

from flowgrain.config import load_config


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, {1: 0, 25: 0, 26: 1, 50: 1, 51: 2, 500: 19, 501: 20, 525: 20, 526: 0}),
        ({"window_end": "stay"}, {526: 20, 9999: 20}),
        ({"window_stride": 4, "window_interval": 10}, {10: 0, 11: 4, 21: 8, 51: 20, 61: 0}),
        ({"window_schedule": "decay", "window_interval": 10}, {10: 0, 11: 1, 19: 1, 20: 2}),
        (
            {"window_schedule": "exp_decay", "window_interval": 10},
            {130: 12, 131: 13, 140: 13, 141: 14, 151: 15, 160: 16},
        ),
        ({"window_schedule": "frozen"}, {1: 0, 10_000: 0}),
        ({"window_region": "first_half"}, {1: 0, 201: 8, 225: 8, 226: 0}),
    ],
)
def test_positions_by_hand(options, starts):
    changes = {f"method.{name}": value for name, value in options.items()}
    method = load_config("mixgrpo", changes).method
    windows = {step: method.window(25, step, seed=0) for step in starts}
    assert {step: window.start for step, window in windows.items()} == starts
    assert {len(window) for window in windows.values()} == {4}


@pytest.mark.parametrize("name", ["mixgrpo", "flow_grpo_fast"])
def test_random_windows_are_never_empty_and_go_everywhere(name):
    config = load_config(name, {"method.window_schedule": "random"})
    method, num_steps = config.method, config.sampling.num_steps
    windows = [method.window(num_steps, step, seed=0) for step in range(1, 400)]
    assert {len(window) for window in windows} == {method.window_size}
    room = num_steps // 2 if name == "flow_grpo_fast" else num_steps - 1
    starts = {window.start for window in windows}
    assert starts == set(range(room - method.window_size + 1))
    assert method.window(num_steps, 7, 0) == method.window(num_steps, 7, 0)
    others = [method.window(num_steps, step, seed=1) for step in range(1, 400)]
    assert others != windows


def test_the_smallest_window_fits_the_smallest_grid():
    config = load_config("mixgrpo", {"sampling.num_steps": 2, "method.window_size": 1})
    assert {config.method.window(2, step, 0) for step in range(1, 100)} == {range(0, 1)}
