"""Checkpoint files: local, from the Hugging Face Hub, pickled, and damaged."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from flowgrain.rewards import RewardConfig, build_reward
from flowgrain.rewards.checkpoints import checkpoint_file, linear_head, read_checkpoint
from flowgrain.rewards.options import OptionError
from flowgrain.settings import SettingsError

STATE = {"a": torch.arange(3.0)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face Hub with a single file. The requests are recorded."""
    requests = []

    def download(repository, file):
        requests.append((repository, file))
        if file != "sub/model.safetensors":
            raise FileNotFoundError("404 Not Found")
        return str(tmp_path / "downloaded.safetensors")

    save_file(STATE, tmp_path / "downloaded.safetensors")
    monkeypatch.setattr("flowgrain.rewards.checkpoints.hf_hub_download", download)
    return requests


def test_a_file_of_the_hub_is_downloaded(hub):
    state = read_checkpoint("org/repo.x/sub/model.safetensors", allow_pickle=False)
    assert torch.equal(state["a"], STATE["a"])
    assert hub == [("org/repo.x", "sub/model.safetensors")]


def test_a_local_file_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "repo").mkdir(parents=True)
    save_file(STATE, tmp_path / "org" / "repo" / "model.safetensors")
    path = checkpoint_file("org/repo/model.safetensors", allow_pickle=False)
    assert path.resolve() == tmp_path / "org" / "repo" / "model.safetensors"
    assert hub == []


def test_a_failed_download_is_named(hub):
    with pytest.raises(OptionError, match=r"checkpoint=org/repo/x\.safetensors: .*404 Not Found"):
        checkpoint_file("org/repo/x.safetensors", allow_pickle=False)


def test_a_real_download_fails_offline():
    with pytest.raises(OptionError, match=r"no such local file, and the download .* failed"):
        checkpoint_file("no-such-org/no-such-repo/x.safetensors", allow_pickle=False)


@pytest.mark.parametrize("name", ["nowhere.pt", "/a/b/c.pt", "./a/b/c.pt", "../a/b/c.pt", "a/b.pt"])
def test_a_missing_file_is_not_looked_up_on_the_hub(hub, name):
    with pytest.raises(OptionError, match="there is no such file"):
        checkpoint_file(name, allow_pickle=True)
    assert hub == []


def test_a_pickle_is_refused_before_it_is_downloaded(hub):
    with pytest.raises(OptionError, match=r"x\.pt: a pickle .*Set allow_pickle=true"):
        checkpoint_file("org/repo/x.pt", allow_pickle=False)
    assert hub == []


@pytest.mark.parametrize(
    ("name", "repository", "file"),
    [
        ("hps", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        ("imagereward", "THUDM/ImageReward", "ImageReward.pt"),
    ],
)
def test_published_checkpoints_are_the_default(hub, monkeypatch, name, repository, file):
    from transformers import CLIPConfig

    monkeypatch.setattr(
        "flowgrain.rewards.open_clip.AutoConfig.from_pretrained", lambda path: CLIPConfig()
    )
    with pytest.raises(SettingsError, match=rf"rewards\[{name}\]\.checkpoint=.*allow_pickle=true"):
        build_reward(RewardConfig(name=name))
    assert hub == []
    with pytest.raises(SettingsError, match=rf"rewards\[{name}\]\.checkpoint=.*404 Not Found"):
        build_reward(RewardConfig(name=name, allow_pickle=True))
    assert hub == [(repository, file)]


class Evil:
    def __reduce__(self):
        return (print, ("code of a pickle",))


def test_only_tensors_are_unpickled(tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    torch.save({"a": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(OptionError, match=rf"{name}: not a checkpoint, or it contains objects"):
            read_checkpoint(str(tmp_path / name), allow_pickle=True)
    assert "code of a pickle" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, {"a": 1}, [torch.zeros(1)], {"state_dict": {"a": "x"}}])
def test_a_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(OptionError, match="not a state dict"):
        read_checkpoint(str(tmp_path / "x.pt"), allow_pickle=True)


def test_a_truncated_file(tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(OptionError, match="not a checkpoint"):
        read_checkpoint(str(tmp_path / "x.pt"), allow_pickle=True)


def test_a_head_without_layers():
    with pytest.raises(KeyError, match="first layer"):
        linear_head({"2.weight": torch.zeros(1, 1)})
