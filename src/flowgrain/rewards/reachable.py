"""A check, before a run starts, that somebody answers at the address of a reward server."""

import socket
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies

from flowgrain.rewards.base import Reward
from flowgrain.rewards.judge import Judge
from flowgrain.rewards.remote import Remote
from flowgrain.settings import SettingsError

SECONDS = 5.0
"""Longest time to connect."""


def check_server(name: str, reward: Reward) -> None:
    """Connect to the server of a reward. Does nothing for other rewards, or behind a proxy.

    Nothing is sent, so a busy server answers, too.

    Args:
        name: name of the reward, for the message.
        reward: the reward.

    Raises:
        SettingsError: no server answers.
    """
    if not isinstance(reward, Remote | Judge) or get_environ_proxies(reward.url):
        return
    url, port = reward.url.removesuffix("/chat/completions"), 8600
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
