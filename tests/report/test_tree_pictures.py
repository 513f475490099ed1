"""Pictures of trees: every image appears below the steps that it credits."""

import numpy as np
import pytest

from flowgrain import load_config
from flowgrain.methods import ForwardProcess
from flowgrain.records import GroupRecord, GroupTree, PromptGroup
from flowgrain.records.group_files import write_group
from flowgrain.report.tree_picture import read_tree_picture


def written(folder, method, change=lambda group: None, **options):
    """A file with the groups of `method`, and its content. Image number i has reward i."""
    settings = {f"method.{name}": value for name, value in options.items()}
    config = load_config(method, {"sampling.num_steps": 4, **settings})
    tree = config.tree()
    credited = tree.leaves if isinstance(config.method, ForwardProcess) else tree.edges
    count = len(tree.leaves)
    group = GroupRecord(
        step=7,
        method=method,
        num_steps=4,
        sigmas=[1.0, 0.75, 0.5, 0.25, 0.0],
        tree=GroupTree(
            parent=tree.parent.tolist(),
            grid_index=tree.grid_index.tolist(),
            stochastic=tree.stochastic.tolist(),
            leaves=tree.leaves.tolist(),
            image=tree.image.tolist(),
            channel=tree.channel.tolist(),
            edges=credited.tolist(),
        ),
        rewards=["mine"],
        reward_weights={"mine": 1.0},
        image_size=[2, 2],
        prompts=[
            PromptGroup(
                text="a prompt",
                recorded=True,
                rewards={"mine": [float(place) for place in range(count)]},
                monitors={},
                advantage=np.linspace(-1, 2, len(credited)).tolist(),
                full=[],
            )
        ],
        path=folder / "step-000007.zip",
    )
    change(group)
    images = {(0, i): np.full((2, 2, 3), i % 256, dtype=np.uint8) for i in range(count)}
    write_group(group, images, 160)
    return group.path, group


def numbers(branch):
    """The rewards of a branch's images, which are their numbers."""
    return [value for image in branch.images for _, value in image.rewards]


def test_branches_with_several_granularities(tmp_path):
    path, record = written(tmp_path, "g2rpo", group_size=3, granularities=[1, 2])
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
    assert sorted([*shown, anchor]) == list(range(len(record.tree.leaves)))


def test_the_steps_of_a_trajectory_are_one_group(tmp_path):
    def by_trajectory(group):
        advantage = dict(zip(group.tree.leaves, (1.0, -1.0, 0.0), strict=True))
        edges = group.tree.edges
        group.prompts[0].advantage[:] = [advantage[_leaf_below(group.tree, e)] for e in edges]

    path, record = written(tmp_path, "flow_grpo", by_trajectory, group_size=3)
    steps = {record.tree.grid_index[record.tree.parent[edge]] for edge in record.tree.edges}
    picture = read_tree_picture(path)
    (group,) = picture.groups
    assert group.grid_steps == sorted(steps)
    assert group.title.startswith("Grid steps 0 to ")
    assert [branch.advantage for branch in group.branches] == [1.0, 0.0, -1.0]
    assert [len(branch.images) for branch in group.branches] == [1, 1, 1]
    assert picture.anchor is None
    assert not picture.several_lengths


def _leaf_below(tree, row):
    children = [i for i, parent in enumerate(tree.parent) if parent == row]
    return _leaf_below(tree, children[0]) if children else row


def test_the_completion_after_a_step(tmp_path):
    """With a completion of every state, a step shows that of the state after it."""
    path, record = written(tmp_path, "densegrpo", group_size=2)
    picture = read_tree_picture(path)
    assert [len(group.branches) for group in picture.groups] == [2] * len(picture.groups)
    channel = dict(zip(record.tree.image, record.tree.channel, strict=True))
    for part in picture.groups:
        for branch in part.branches:
            (number,) = map(int, numbers(branch))
            assert channel[record.tree.leaves[number]] == part.grid_steps[0] + 1
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
    path, record = written(tmp_path, method, **options)
    picture = read_tree_picture(path)
    branches = [branch for group in picture.groups for branch in group.branches]
    assert all(branch.images for branch in branches)
    assert len(branches) <= len(record.tree.edges)
