"""Pictures of trees: every image appears below the steps that it credits."""

import json

import numpy as np
import pytest
import torch

from flowgrain import load_config
from flowgrain.methods import ForwardProcess
from flowgrain.report.tree_picture import read_tree_picture
from flowgrain.training.pictures import contact_sheet, to_pixels
from flowgrain.training.recorder import TREE_COLUMNS


def written(folder, method, **options):
    """The file of a tree of `method`. Image number i has reward i."""
    settings = {f"method.{name}": value for name, value in options.items()}
    config = load_config(method, {"sampling.num_steps": 4, **settings})
    tree = config.tree()
    credited = tree.leaves if isinstance(config.method, ForwardProcess) else tree.edges
    images = torch.linspace(0, 1, len(tree.leaves))[:, None, None, None].expand(-1, 3, 2, 2)
    values = {
        "step": 7,
        "prompt": "a prompt",
        "num_steps": 4,
        "parent": tree.parent.tolist(),
        "grid_index": tree.grid_index.tolist(),
        "stochastic": tree.stochastic.tolist(),
        "leaves": tree.leaves.tolist(),
        "image": tree.image.tolist(),
        "channel": tree.channel.tolist(),
        "rewards": {"mine": list(range(len(tree.leaves)))},
        "edges": credited.tolist(),
        "advantage": np.linspace(-1, 2, len(credited)).tolist(),
    }
    contact_sheet(to_pixels(images), TREE_COLUMNS).save(folder / "tree-000007.png")
    (folder / "tree-000007.json").write_text(json.dumps(values))
    return folder / "tree-000007.json", values


def numbers(branch):
    """The rewards of a branch's images, which are their numbers."""
    return [value for image in branch.images for _, value in image.rewards]


def test_branches_with_several_granularities(tmp_path):
    path, values = written(tmp_path, "g2rpo", group_size=3, granularities=[1, 2])
    picture = read_tree_picture(path)
    assert (picture.step, picture.prompt, picture.rewards) == (7, "a prompt", ["mine"])
    assert [group.title for group in picture.groups] == [
        "Grid step 0: 3 branches",
        "Grid step 1: 3 branches",
    ]
    assert picture.several_lengths
    assert picture.largest_advantage == 2
    for group in picture.groups:
        advantages = [branch.advantage for branch in group.branches]
        assert advantages == sorted(advantages, reverse=True)
    assert [image.steps for image in picture.groups[0].branches[0].images] == [3, 2]
    shown = [number for group in picture.groups for b in group.branches for number in numbers(b)]
    (anchor,) = [value for _, value in picture.anchor.rewards]
    assert sorted([*shown, anchor]) == list(range(len(values["leaves"])))


def test_the_steps_of_a_trajectory_are_one_group(tmp_path):
    path, values = written(tmp_path, "flow_grpo", group_size=3)
    steps = np.array(values["grid_index"])[values["parent"]][values["edges"]]
    by_trajectory = dict(zip(sorted(set(values["leaves"])), (1.0, -1.0, 0.0), strict=True))
    values["advantage"] = [by_trajectory[_leaf_below(values, edge)] for edge in values["edges"]]
    path.write_text(json.dumps(values))
    picture = read_tree_picture(path)
    (group,) = picture.groups
    assert group.grid_steps == sorted(set(steps.tolist()))
    assert group.title.startswith("Grid steps 0 to ")
    assert [branch.advantage for branch in group.branches] == [1.0, 0.0, -1.0]
    assert [len(branch.images) for branch in group.branches] == [1, 1, 1]
    assert picture.anchor is None
    assert not picture.several_lengths


def _leaf_below(values, row):
    children = [i for i, parent in enumerate(values["parent"]) if parent == row]
    return _leaf_below(values, children[0]) if children else row


def test_the_completion_after_a_step(tmp_path):
    """With a completion of every state, a step shows that of the state after it."""
    path, values = written(tmp_path, "densegrpo", group_size=2)
    picture = read_tree_picture(path)
    assert [len(group.branches) for group in picture.groups] == [2] * len(picture.groups)
    channel = dict(zip(values["image"], values["channel"], strict=True))
    for group in picture.groups:
        for branch in group.branches:
            (number,) = numbers(branch)
            assert channel[values["leaves"][number]] == group.grid_steps[0] + 1
    assert picture.anchor is None


def test_a_method_that_trains_on_images(tmp_path):
    path, _ = written(tmp_path, "diffusionnft", group_size=4)
    picture = read_tree_picture(path)
    (group,) = picture.groups
    assert group.title == "4 images"
    assert sorted(n for branch in group.branches for n in numbers(branch)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("branchgrpo", {"split_steps": [0, 1], "group_size": 4}),
        ("tempflow_grpo", {}),
        ("mixgrpo", {"window_size": 2}),
        ("dancegrpo", {}),
    ],
)
def test_every_step_has_images(tmp_path, method, options):
    path, values = written(tmp_path, method, **options)
    picture = read_tree_picture(path)
    branches = [branch for group in picture.groups for branch in group.branches]
    assert all(branch.images for branch in branches)
    assert len(branches) <= len(values["edges"])
