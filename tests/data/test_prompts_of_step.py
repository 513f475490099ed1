"""The prompts and the noise of a training step: functions of the seed and the step alone."""

import numpy as np
import pytest
import torch
from toy import Toy

from flowgrain import Prompt, SettingsError, load_config
from flowgrain.data import keyed_noise, latent_noise, prompts_of_step, read_prompts
from flowgrain.training.load import load_prompts


class Counting(Toy):
    """A backbone that accepts every prompt and counts the calls of `check`. It has no prompts."""

    def __init__(self):
        super().__init__()
        self.checked = []

    def check(self, texts):
        self.checked.append(len(texts))

    def bundled_prompts(self, split):
        return []


def test_every_epoch_visits_every_prompt_once_in_its_own_order():
    prompts = [Prompt(str(i)) for i in range(10)]
    taken = [p.text for step in range(1, 11) for p in prompts_of_step(prompts, step, 4, seed=3)]
    epochs = [taken[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert prompts_of_step(prompts, 1, 4, seed=3) == prompts_of_step(prompts, 1, 4, seed=3)
    assert prompts_of_step(prompts, 1, 4, seed=3) != prompts_of_step(prompts, 1, 4, seed=4)
    assert len(prompts_of_step(prompts[:3], 1, 7, seed=0)) == 7  # more than an epoch


def test_100000_prompts_are_read_once_checked_once_and_permuted_once_per_epoch(
    tmp_path, monkeypatch
):
    """Count calls, not seconds."""
    count = 100_000
    (tmp_path / "a.txt").write_text("\n".join(f"prompt number {i}" for i in range(count)))
    reads, permutations = [], []
    read, default_rng = read_prompts, np.random.default_rng

    def counting_read(setting, path):
        reads.append(path)
        return read(setting, path)

    def counting_rng(seed):
        permutations.append(seed)
        return default_rng(seed)

    monkeypatch.setattr("flowgrain.training.load.read_prompts", counting_read)
    monkeypatch.setattr("flowgrain.data.np.random.default_rng", counting_rng)
    config = load_config(
        "g2rpo", {"data.prompts": str(tmp_path / "a.txt"), "data.eval_prompts": "not_read.txt"}
    )
    backbone = Counting()
    prompts = load_prompts(config, backbone, "train")
    assert len(set(prompts)) == count
    assert backbone.checked == [count]
    assert len(reads) == 1
    first, second = (prompts_of_step(prompts, step, 24, 0) for step in (1, 2))
    assert len({*first, *second}) == 48
    assert permutations == [[0, 0], [0, 0]]  # seed and epoch, once per step
    across = prompts_of_step(prompts, count // 24 + 1, 24, 0)  # the last of epoch 0, the first of 1
    assert len(across) == 24
    assert permutations[2:] == [[0, 0], [0, 1]]


def test_the_last_tenth_is_held_out_where_nothing_else_can_be_evaluated(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(50)))
    config = load_config("g2rpo", {"data.prompts": str(file)})
    backbone = Counting()
    train, held_out = (load_prompts(config, backbone, use) for use in ("train", "eval"))
    assert [p.text for p in train] == [f"prompt {i}" for i in range(45)]
    assert [p.text for p in held_out] == [f"prompt {i}" for i in range(45, 50)]
    # A resumed run may change the size of an evaluation. That must not change the training prompts.
    fewer = config.with_changes({"evaluation.num_prompts": 2})
    assert load_prompts(fewer, backbone, "train") == train
    # Evaluation prompts that were given from Python need no held-out ones.
    assert len(load_prompts(config, backbone, "train", hold_out=False)) == 50
    file.write_text("a\nb\nc")
    assert [p.text for p in load_prompts(config, backbone, "eval")] == ["c"]
    assert [p.text for p in load_prompts(config, backbone, "train")] == ["a", "b"]
    file.write_text("a")
    for use in ("train", "eval"):
        with pytest.raises(SettingsError, match=r"cannot be divided .*Set data\.eval_prompts"):
            load_prompts(config, backbone, use)


def test_nothing_is_held_out_where_other_prompts_are_evaluated(tmp_path):
    train, other = tmp_path / "train.txt", tmp_path / "eval.txt"
    train.write_text("zero\none\ntwo")
    other.write_text("three")
    config = load_config("g2rpo", {"data.prompts": str(train)})
    assert len(load_prompts(config, Toy(), "train")) == 3  # it has its own evaluation prompts
    assert [p.text for p in load_prompts(config, Toy(), "eval")] == ["zero", "one", "two", "three"]
    config = config.with_changes({"data.eval_prompts": str(other)})
    assert len(load_prompts(config, Counting(), "train")) == 3
    assert [p.text for p in load_prompts(config, Counting(), "eval")] == ["three"]


def test_prompts_given_from_python_come_first(tmp_path):
    config = load_config("g2rpo", {"data.prompts": str(tmp_path / "missing.txt")})
    assert load_prompts(config, Toy(), "train", ["one", "two"]) == [Prompt("one"), Prompt("two")]
    with pytest.raises(SettingsError, match=r"data\.prompts: prompt 2 is blank"):
        load_prompts(config, Toy(), "train", ["one", " "])
    with pytest.raises(SettingsError, match=r"data\.eval_prompts: prompt 1: 'four' is not in"):
        load_prompts(config, Toy(), "eval", ["four"])
    with pytest.raises(SettingsError, match=r"data\.prompts: there are no prompts"):
        load_prompts(config, Toy(), "train", [])


def test_a_backbone_without_prompts_needs_a_file():
    with pytest.raises(SettingsError, match=r"data\.prompts: there are no prompts\. Give the path"):
        load_prompts(load_config("g2rpo"), Counting(), "train")


def test_noise_is_determined_by_its_key_alone():
    one = latent_noise((2, 3), "train", 0, 1)
    assert torch.equal(one, latent_noise((2, 3), "train", 0, 1))
    assert not torch.equal(one, latent_noise((2, 3), "train", 0, 2))
    noise = keyed_noise((2, 3), "train", 0)
    together = noise(np.array([0, 1, 0]), np.array([0, 0, 5]))
    assert torch.equal(together[2], noise(np.array([0]), np.array([5]))[0])
    assert torch.equal(together[1], latent_noise((2, 3), "train", 0, 1, 0))
    many = latent_noise((10_000,), "train", 0)
    assert many.mean().abs() < 0.05
    assert many.std() == pytest.approx(1, abs=0.05)
