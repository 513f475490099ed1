"""Rewards that compare images get whole groups: scoring, training, evaluation and serving."""

import json

import numpy as np
import pytest
import torch
from toy import PROMPTS, Toy, red

from flowgrain import Trainer, load_config
from flowgrain.data import Prompt
from flowgrain.evaluation.request import make_request
from flowgrain.evaluation.run import run_evaluation
from flowgrain.methods import METHODS, plan_tree
from flowgrain.planning.doctor import check_parts
from flowgrain.rewards import GroupReward, Scorer, Unscored, score
from flowgrain.rewards.server import reward_app
from flowgrain.settings import SettingsError
from flowgrain.training.load import load_rewards

PAIRWISE = {"name": "pairwise", "judge": "score"}
TOY_PAIRWISE = {
    "name": "pairwise",
    "judge": {"name": "score", "reward": "toy:red"},
    "comparisons": 3,
}
SMALL = {
    "sampling.num_steps": 4,
    "method.group_size": 4,
    "training.prompts_per_step": 3,
    "training.max_steps": 3,
    "evaluation.every": 0,
    "evaluation.num_prompts": 4,
    "evaluation.num_steps": 4,
    "evaluation.rewards": [],
    "optimizer.learning_rate": 1e-3,
}


class Rank:
    """The share of images of the group that are darker. Records the groups."""

    def __init__(self):
        self.groups = []

    def score_group(self, images, prompt):
        self.groups.append((prompt.text, len(images)))
        light = images.mean((1, 2, 3))
        return (light[:, None] > light).double().mean(1)


def test_a_group_is_a_prompt_or_the_given_number():
    images = torch.rand(6, 3, 2, 2)
    reward = Rank()
    assert isinstance(reward, GroupReward)
    prompts = ["a", "b", "a", "b", "b", "a"]
    scores = score(reward, images, prompts, batch_size=1)
    assert reward.groups == [("a", 3), ("b", 3)]
    places = [0, 2, 5]
    alone = Rank().score_group(images[places], Prompt("a")).float()
    assert torch.equal(scores.values[places], alone)
    score(reward, images, prompts, groups=[7, 1, 2, 1, 1, 2])
    assert reward.groups[2:] == [("a", 1), ("b", 3), ("a", 2)]
    assert score(reward, images[:0], []).values.shape == (0,)


def test_a_failure_masks_one_group():
    class Fails:
        def score_group(self, images, prompt):
            if prompt.text == "bad":
                raise ConnectionError("gone")
            images.zero_()  # of a copy
            return [0.5] * len(images)

    images = torch.rand(4, 3, 2, 2)
    before = images.clone()
    scores = score(Fails(), images, ["a", "bad", "a", "bad"])
    assert scores.values.isnan().tolist() == [False, True, False, True]
    assert scores.failed == 2
    assert scores.reason.startswith("ConnectionError: gone")
    assert torch.equal(images, before)


def test_a_reward_that_gives_up_is_not_called_for_later_groups():
    calls = []

    class GivesUp:
        def score_group(self, images, prompt):
            calls.append(prompt.text)
            raise Unscored("server gone", [1.0, float("nan")], gave_up=True)

    with Scorer({"x": GivesUp()}, background=True) as scorer:
        scorer.submit(torch.rand(4, 3, 2, 2), ["a", "a", "b", "b"])
        scorer.submit(torch.rand(2, 3, 2, 2), ["c", "c"])
        scores = scorer.results()["x"]
    assert calls == ["a"]
    assert scores.values.isnan().tolist() == [False] + [True] * 5
    assert scores.reason == "server gone"


def of_method(name):
    changes = {"method.split_steps": [0, 1]} if name == "branchgrpo" else {}
    if "window_size" in METHODS.get(name).model_fields:
        changes = {"method.window_size": 2}
    if name == "e_grpo":
        changes = {"method.sde_steps": [0], "method.merged_steps": [2]}
    return load_config(name, {**SMALL, **changes})


@pytest.mark.parametrize("name", METHODS)
def test_groups_of_every_method_have_several_images_of_one_prompt(name):
    config = of_method(name)
    tree = plan_tree(config.method, config.sampling.num_steps, 1, 0).repeat(3)
    groups = config.method.leaf_groups(tree)
    assert len(groups) == len(tree.leaves)
    of_prompt = tree.prompt[tree.leaves]
    for group in np.unique(groups):
        assert len(set(of_prompt[groups == group])) == 1
        assert (groups == group).sum() >= 4


def test_granularities_are_not_compared_with_each_other():
    """The late branches of both granularities are the same images, which count as the first."""
    config = load_config("g2rpo", {**SMALL, "method.granularities": [1, 2]})
    tree = plan_tree(config.method, 4, 1, 0)
    channels = {
        int(leaf): sorted(tree.channel[tree.image == leaf].tolist()) for leaf in tree.leaves
    }
    groups = config.method.leaf_groups(tree)
    assert [channels[int(leaf)][0] for leaf in tree.leaves] == groups.tolist()
    assert set(groups.tolist()) == {0, 1}


CASES = {
    "g2rpo": {"method.granularities": [1, 2]},
    "diffusionnft": {},
    "densegrpo": {"method.calibration.rounds": 1, "method.calibration.samples": 2},
}


@pytest.mark.parametrize("method", CASES)
def test_training_by_comparisons(method, tmp_path):
    config = load_config(method, {**SMALL, **CASES[method], "rewards": [PAIRWISE]})
    trainer = Trainer(config, tmp_path / "run")
    before = {name: p.clone() for name, p in trainer.policy.parameters.items()}
    metrics = [line for line in trainer.train() if line["step"]]
    assert len(metrics) == 3
    for line in metrics:
        assert line["reward/pairwise"] == pytest.approx(0.5, abs=1e-6)
        assert line["failed/pairwise"] == 0
        assert line["advantage/zero"] < 0.5
    assert any(not torch.equal(p, before[n]) for n, p in trainer.policy.parameters.items())


@pytest.mark.parametrize("method", ["g2rpo", "diffusionnft"])
def test_chunks_and_a_resume_change_no_score(method, tmp_path):
    """The prompts of a step repeat, and repeats of a prompt are different groups."""
    changes = {**SMALL, "training.prompts_per_step": 6, "rewards": [TOY_PAIRWISE]}
    config = load_config(method, changes)

    def run(folder, changes):
        return Trainer(
            config.with_changes(changes), tmp_path / folder, backbone=Toy(), prompts=PROMPTS
        )

    whole = run("whole", {})
    scores = [whole.collector.collect(step).scores["pairwise"].values for step in (1, 2)]
    assert not torch.equal(*scores)
    for folder, size in (("a", 1), ("b", 4)):
        chunked = run(folder, {"sampling.prompts_per_chunk": size})
        for step in (2, 1):
            found = chunked.collector.collect(step).scores["pairwise"].values
            assert torch.equal(found, scores[step - 1])
    run("resumed", {"training.max_steps": 2, "training.checkpoint_every": 1}).train()
    resumed = run("resumed", {})
    resumed.resume()
    assert resumed.train()[-1]["grad_norm"] == run("one", {}).train()[-1]["grad_norm"]


def test_a_group_is_never_split_in_training(tmp_path):
    config = load_config(
        "g2rpo",
        {
            **SMALL,
            "method.granularities": [1, 2],
            "sampling.prompts_per_chunk": 2,
            "rewards": [{"name": "rank", "batch_size": 2}],
        },
    )
    rank = Rank()
    trainer = Trainer(
        config, tmp_path / "run", backbone=Toy(), prompts=PROMPTS, rewards={"rank": rank}
    )
    tree = plan_tree(config.method, 4, 1, 0)
    sizes = np.bincount(config.method.leaf_groups(tree)).tolist()
    batch = trainer.collector.collect(1)
    expected = [(prompt.text, size) for prompt in batch.prompts for size in sizes]
    assert sorted(rank.groups) == sorted(expected)


def test_evaluation_leaves_out_rewards_that_compare(tmp_path, caplog):
    config = load_config("g2rpo", {**SMALL, "rewards": [PAIRWISE]})
    trained, evaluated = load_rewards(config)
    assert caplog.messages == [
        "rewards[pairwise] is not evaluated, because it compares the images of a prompt, and an "
        "evaluation has one image per prompt. Add another reward to evaluation.rewards."
    ]
    assert list(trained) == ["pairwise"]
    assert evaluated == {}
    both = config.with_changes({"evaluation.rewards": ["oracle"]})
    assert list(load_rewards(both)[1]) == ["oracle"]
    assert caplog.messages[1].endswith("one image per prompt.")
    wrong = load_config("g2rpo", {**SMALL, "rewards": ["oracle"], "evaluation.rewards": [PAIRWISE]})
    with pytest.raises(SettingsError, match=r"^evaluation\.rewards: 'pairwise' compares the im"):
        load_rewards(wrong)
    trainer = Trainer(both, tmp_path / "run")
    assert list(trainer.evaluate().scores) == ["oracle"]


def test_an_evaluation_without_a_reward_is_an_error(tmp_path):
    config = load_config("g2rpo", {**SMALL, "rewards": [PAIRWISE], "training.max_steps": 1})
    Trainer(config, tmp_path / "run").train()
    request = make_request([str(tmp_path / "run")], {"evaluation.num_prompts": 2})
    with pytest.raises(SettingsError, match=r"evaluation\.rewards is empty\. Name a reward"):
        run_evaluation(request, tmp_path / "out")


def test_doctor_compares_two_images(tmp_path):
    config = load_config("g2rpo", {**SMALL, "rewards": [PAIRWISE]})
    findings = {finding.name: finding for finding in check_parts(Trainer(config, tmp_path / "run"))}
    found = findings["reward pairwise"]
    assert found.ok
    assert found.message == "0.500 for an image of noise"


def test_a_server_refuses_rewards_that_compare():
    with pytest.raises(SettingsError, match=r"^rank: cannot be served, because it compares all"):
        reward_app({"red": red, "rank": Rank()})


def test_the_run_records_the_judge(tmp_path):
    """A run can be resumed from its files, because they contain the options of the judge."""
    config = load_config("g2rpo", {**SMALL, "training.max_steps": 1, "rewards": [PAIRWISE]})
    Trainer(config, tmp_path / "run").train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "reward/pairwise" in json.loads(lines[-1])
    assert "judge: score" in (tmp_path / "run" / "run.yaml").read_text()
