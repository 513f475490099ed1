"""Plans: grids by hand, costs against the published table, shared states, pruning."""

import pytest

from flowgrain.methods.algorithms import METHODS, build, plan_tree
from flowgrain.config.schema import PAPER, settings
from flowgrain.core.tree import Planner, coarse_levels, cost, schedule


def test_every_method_has_its_paper():
    assert METHODS.keys() == PAPER.keys()


@pytest.mark.parametrize(
    ("start", "stride", "grid", "levels"),
    [
        (2, 2, "stride", [2, 3, 5, 7, 9, 11, 13, 16]),
        (1, 3, "stride", [1, 2, 5, 8, 11, 16]),
        (2, 2, "exact", [2, 3, 5, 7, 9, 11, 13, 15, 16]),
        (13, 1, "stride", [13, 14, 15, 16]),
        (15, 3, "stride", [15, 16]),
        (16, 1, "exact", [16]),
    ],
)
def test_coarse_grids_by_hand(start, stride, grid, levels):
    assert coarse_levels(start, 16, stride, grid) == levels


@pytest.mark.parametrize(("strides", "passes", "published"), [("1", 1120, 1216), ("1,2", 1504, 1792), ("1,2,3", 1708, 2188)])
@pytest.mark.parametrize("anchor", [True, False])
def test_g2rpo_costs_the_minimum(strides, passes, published, anchor):
    s = settings({"granularities": strides, "anchor_image": anchor})
    method = build(s)
    price = cost(plan_tree(method, s))
    assert price.forward_passes == passes - (0 if anchor else 8)
    assert method.published_passes == published
    assert price.train_forward_passes == 8
    assert price.trained_edges == 96


def test_peak_latents_follow_live_states():
    s = settings({"granularities": "1"})
    longer = settings({"granularities": "1", "num_steps": 32, "sde_steps": "0,1,2,3,4,5,6,7"})
    trees = [plan_tree(build(x), x) for x in (s, longer)]
    slots = [schedule(tree, 64).num_slots for tree in trees]
    assert len(trees[1]) > 2 * len(trees[0])
    assert slots[1] <= slots[0] + 2  # the same branches live at once, however many states they pass through


def test_states_are_shared_and_dead_rows_dropped():
    planner = Planner(4)
    root = planner.root()
    assert planner.ode(root, to=2) == planner.ode(root, to=2)
    planner.sde(root, fan=5)
    planner.image(planner.ode(root))
    assert len(planner.tree()) == 5


def test_planner_refuses_what_cannot_be():
    planner = Planner(4)
    root = planner.root()
    with pytest.raises(ValueError, match="stride 0"):
        planner.ode(root, stride=0)
    with pytest.raises(ValueError, match="short of sigma = 0"):
        planner.image(root)
    with pytest.raises(ValueError, match="sigma = 0"):
        planner.sde(planner.ode(root))
    with pytest.raises(ValueError, match="no image"):
        planner.tree()
