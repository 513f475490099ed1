"""Access to the Hugging Face Hub without long waits on a machine that is offline."""

import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

_TIMEOUT, _VALID = 3.0, 60.0
"""Seconds to wait for a connection, and seconds for which its result is used again."""
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_checked: tuple[float, bool] | None = None
_switched_off = False


def unreachable(setting: str, kind: str = "directory") -> str:
    """The error message of a file or directory that neither exists nor is in the cache of the Hub.

    Args:
        setting: the setting and its value, such as "model.path=NAME".
        kind: what is missing.
    """
    return (
        f"{setting}: there is no such local {kind}, and it is not in the cache of the Hugging Face "
        f"Hub, which cannot be reached. Give the path of a {kind}, or connect this machine."
    )


def use_cache_if_offline(path: str | None) -> bool:
    """Let huggingface_hub read only its cache, if `path` is on the Hub and the Hub is unreachable.

    Otherwise huggingface_hub tries every file six times, which takes about 25 seconds each.

    Returns:
        Whether the Hub is unreachable. False if the user has set HF_HUB_OFFLINE.
    """
    global _switched_off
    if path is None or Path(path).expanduser().exists():
        return False
    if constants.HF_HUB_OFFLINE and not _switched_off:
        return False  # the user's choice: huggingface_hub does not try
    if any(os.environ.get(name) for name in _PROXIES):
        return False  # only the proxy can connect
    _switched_off = not _reachable()
    constants.HF_HUB_OFFLINE = _switched_off
    return _switched_off


def _reachable() -> bool:
    """Whether the server of the Hub accepts connections."""
    global _checked
    if _checked is None or time.monotonic() - _checked[0] > _VALID:
        address = urlsplit(constants.ENDPOINT)
        port = address.port or (80 if address.scheme == "http" else 443)
        try:
            socket.create_connection((address.hostname or "", port), timeout=_TIMEOUT).close()
            connected = True
        except OSError:
            connected = False
        _checked = time.monotonic(), connected
    return _checked[1]
