"""Repositories of the Hugging Face Hub on a machine that is offline."""

import socket
import time

import pytest
from huggingface_hub import constants

from flowgrain import SettingsError, hub, load_config
from flowgrain.rewards import RewardConfig, build_reward
from flowgrain.training.load import load_model


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A machine without network, with an empty cache."""

    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_checked", None)
    monkeypatch.setattr(hub, "_switched_off", False)
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)


def test_a_model_and_a_reward_are_refused_at_once(offline):
    config = load_config("flux/g2rpo", {"model.path": "nobody/nothing-here"})
    begin = time.monotonic()
    with pytest.raises(
        SettingsError, match=r"model.path=nobody/nothing-here: .* cannot be reached"
    ):
        load_model(config)
    with pytest.raises(SettingsError, match=r"path=nobody/nothing-here: .* cannot be reached"):
        build_reward(RewardConfig(name="clip", path="nobody/nothing-here"))
    with pytest.raises(
        SettingsError, match=r"checkpoint=nobody/nothing/a.safetensors: .*cannot be reached"
    ):
        build_reward(RewardConfig(name="aesthetic", checkpoint="nobody/nothing/a.safetensors"))
    assert time.monotonic() - begin < 10  # 25 s for every file without the check


def test_the_hub_is_used_again_when_it_is_reachable(offline, monkeypatch):
    assert hub.use_cache_if_offline("nobody/nothing")
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "_checked", (time.monotonic(), True))
    assert not hub.use_cache_if_offline("nobody/nothing")
    assert not constants.HF_HUB_OFFLINE


def test_local_paths_proxies_and_the_choice_of_the_user(offline, monkeypatch, tmp_path):
    assert not hub.use_cache_if_offline(str(tmp_path))
    assert not hub.use_cache_if_offline(None)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    assert not hub.use_cache_if_offline("nobody/nothing")
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.use_cache_if_offline("nobody/nothing")
    assert constants.HF_HUB_OFFLINE
