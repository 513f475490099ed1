"""The planner: coarse grids by hand, shared states, dropped rows, impossible plans."""

import pytest

from flowgrain.config import load_config
from flowgrain.core.schedule import schedule
from flowgrain.core.tree import Planner, coarse_indices


@pytest.mark.parametrize(
    ("start", "stride", "grid", "indices"),
    [
        (2, 2, "stride", [2, 3, 5, 7, 9, 11, 13, 16]),
        (1, 3, "stride", [1, 2, 5, 8, 11, 16]),
        (2, 2, "exact", [2, 3, 5, 7, 9, 11, 13, 15, 16]),
        (13, 1, "stride", [13, 14, 15, 16]),
        (15, 3, "stride", [15, 16]),
        (16, 1, "exact", [16]),
    ],
)
def test_coarse_grids_by_hand(start, stride, grid, indices):
    assert coarse_indices(start, 16, stride, grid) == indices


def test_peak_latents_follow_live_states():
    """A longer grid does not need more storage. The same branches live at once."""
    config = load_config("g2rpo", {"method.granularities": [1]})
    steps = list(range(8))
    longer = config.with_changes({"sampling.num_steps": 32, "method.sde_steps": steps})
    trees = [config.tree(), longer.tree()]
    slots = [schedule(tree, 64).num_slots for tree in trees]
    assert len(trees[1]) > 2 * len(trees[0])
    assert slots[1] <= slots[0] + 2


def test_states_are_shared_and_dead_rows_dropped():
    planner = Planner(4)
    root = planner.root()
    assert planner.ode(root, to=2) == planner.ode(root, to=2)
    planner.sde(root, fan=5)
    planner.image(planner.ode(root))
    assert len(planner.tree()) == 5


def test_the_planner_rejects_impossible_plans():
    planner = Planner(4)
    root = planner.root()
    with pytest.raises(ValueError, match="stride 0"):
        planner.ode(root, stride=0)
    with pytest.raises(ValueError, match="no ODE leads from index 0 to 5"):
        planner.ode(root, to=5)
    with pytest.raises(ValueError, match="stride 2"):
        planner.ode(root, to=2, stride=2)
    with pytest.raises(ValueError, match=r"via \[2, 1\]"):
        planner.ode(root, via=[2, 1])
    with pytest.raises(ValueError, match="not at sigma = 0"):
        planner.image(root)
    with pytest.raises(ValueError, match="no stochastic step of length 1"):
        planner.sde(planner.ode(root))
    for length in (0, 5):
        with pytest.raises(ValueError, match=f"no stochastic step of length {length}"):
            planner.sde(root, length=length)
    with pytest.raises(ValueError, match="no image"):
        planner.tree()


def test_merged_steps_that_end_together_are_not_compared():
    """Steps 0-2, 1-2 and 1-3: only steps with the same start and end share a group."""
    planner = Planner(4)
    root = planner.root()
    middle = planner.ode(root, to=1)
    for node, length in ((root, 2), (middle, 1), (middle, 2)):
        for branch in planner.sde(node, 2, length=length):
            planner.image(planner.ode(branch))
    tree = planner.tree()
    assert tree.grid_index[tree.edges].tolist() == [2, 2, 2, 2, 3, 3]
    groups = tree.comparison_groups.tolist()
    assert [groups.count(group) for group in groups] == [2] * 6
    assert groups[0] == groups[1] != groups[2] == groups[3] != groups[4] == groups[5]
