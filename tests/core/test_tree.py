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
    with pytest.raises(ValueError, match="is at sigma = 0"):
        planner.sde(planner.ode(root))
    with pytest.raises(ValueError, match="no image"):
        planner.tree()
