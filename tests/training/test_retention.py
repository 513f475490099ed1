"""Which recorded steps are kept, also by a resumed run."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrain.training.retention import Retention


def kept(retention, sizes):
    """The steps on the disk after every step of a run whose step t has sizes[t - 1] bytes."""
    disk, history = {}, []
    for step, size in enumerate(sizes, 1):
        retention.add(step, size)
        disk[step] = size
        for dropped in retention.dropped(list(disk)):
            del disk[dropped]
        history.append(dict(disk))
    return history


def test_the_stride_doubles():
    history = kept(Retention(steps=6, max_bytes=10**9, every=None), [1] * 40)
    assert sorted(history[5]) == [1, 2, 3, 4, 5, 6]
    assert sorted(history[6]) == [1, 2, 4, 6, 7]
    assert sorted(history[30]) == [1, 8, 16, 24, 31]
    assert sorted(history[39]) == [1, 8, 16, 24, 32, 40]


def test_evaluated_steps_are_dropped_last():
    history = kept(Retention(steps=4, max_bytes=10**9, every=5), [1] * 40)
    assert sorted(history[13]) == [1, 5, 10, 14]
    assert sorted(history[39]) == [1, 20, 40]


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    steps=st.integers(1, 20),
    megabytes=st.integers(50, 400),
    every=st.sampled_from([None, 0, 1, 3, 10]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_budget_and_a_kill(sizes, steps, megabytes, every, seed):
    history = kept(Retention(steps, megabytes, every), sizes)
    for step, disk in enumerate(history, 1):
        assert step in disk
        assert len(disk) <= steps
        assert sum(disk.values()) <= megabytes
    # A kill after `killed` steps: the directory may have fewer files than at the checkpoint.
    killed = random.Random(seed).randint(1, len(sizes))
    saved = random.Random(seed + 1).randint(0, killed)
    before = Retention(steps, megabytes, every)
    kept(before, sizes[:saved])
    again = Retention(steps, megabytes, every)
    again.load_state_dict(json.loads(json.dumps(before.state_dict())), {})
    disk = {step: size for step, size in history[killed - 1].items() if step <= saved}
    for step, size in enumerate(sizes[saved:], saved + 1):
        again.add(step, size)
        disk[step] = size
        for dropped in again.dropped(list(disk)):
            del disk[dropped]
    if saved < len(sizes):
        assert disk == history[-1]


def test_a_resumed_run_that_evaluates_other_steps_counts_its_files():
    before = Retention(steps=4, max_bytes=10**9, every=5)
    disk = kept(before, [1] * 20)[-1]
    assert sorted(disk) == [1, 10, 20]
    again = Retention(steps=4, max_bytes=10**9, every=4)
    again.load_state_dict(before.state_dict(), disk)
    for step in range(21, 41):
        again.add(step, 1)
        disk[step] = 1
        for dropped in again.dropped(list(disk)):
            del disk[dropped]
        assert {1, step} <= set(disk)
        assert len(disk) <= 4
    assert sorted(disk) == [1, 24, 32, 40]
