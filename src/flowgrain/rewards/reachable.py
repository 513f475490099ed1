"""A check, before a run starts, that reward servers answer at their addresses."""

import socket
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies

from flowgrain.rewards.base import Reward
from flowgrain.rewards.judge import Judge
from flowgrain.rewards.remote import Remote
from flowgrain.rewards.replica_call import check_replicas
from flowgrain.rewards.replicas import Replicas
from flowgrain.settings import SettingsError

SECONDS = 5.0
"""Longest time to connect."""


def check_server(name: str, reward: Reward) -> None:
    """Connect to the server of a reward. Does nothing for other rewards, or behind a proxy.

    Nothing is sent, so a busy server answers, too. Several servers of a reward are compared, see
    `check_replicas`.

    Args:
        name: name of the reward, for the message.
        reward: the reward.

    Raises:
        SettingsError: no server answers, or several servers do not serve the same reward.
    """
    if isinstance(reward, Remote) and isinstance(reward.server, Replicas):
        try:
            check_replicas(reward.server)
        except SettingsError as error:
            raise SettingsError(f"rewards[{name}].url: {error}") from error
        return
    if not isinstance(reward, Remote | Judge):
        return
    url, port = _address(reward), 8600
    if get_environ_proxies(url):
        return
    try:
        address = urlsplit(url)
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), SECONDS).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        command = "the server"
        if isinstance(reward, Remote):
            command = f"it with flowgrain serve {reward.reward} --port {port}"
        raise SettingsError(
            f"rewards[{name}].url={url}: no server answers ({reason.lower()}). "
            f"Start {command}, or correct the address."
        ) from error


def _address(reward: Remote | Judge) -> str:
    """The address of a server, as it was given."""
    if isinstance(reward, Remote):
        return reward.urls[0]
    return reward.url.removesuffix("/chat/completions")
