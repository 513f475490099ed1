"""The identity of a served reward: what its scores depend on, for the comparison of servers."""

import hashlib
import importlib.metadata
import inspect
import json
import sys
from pathlib import Path

from flowgrain.rewards.base import REWARDS, RewardConfig

_PACKAGES = ("flowgrain", "torch", "transformers")


def reward_identity(config: RewardConfig) -> dict[str, str]:
    """Name, options and versions of a reward as short texts.

    Options are hashed, because they may contain private paths. The index of a GPU is left out. The
    identity of a custom reward contains a hash of its file. Model files are not read.

    Raises:
        PackageNotFoundError: a package has no metadata.
    """
    options = dict(config.options)
    if isinstance(options.get("device"), str):
        options["device"] = options["device"].partition(":")[0]
    identity = {
        "name": config.name,
        "options": _hash(json.dumps(options, sort_keys=True, default=str).encode()),
    }
    for package in _PACKAGES:
        identity[package] = importlib.metadata.version(package)
    source = _custom_source(config.name)
    return identity if source is None else {**identity, "source": _hash(source)}


def _custom_source(name: str) -> bytes | None:
    """The file of a reward that is not part of this package. None: it is, or has no file."""
    module, colon, _ = name.partition(":")
    target = sys.modules.get(module) if colon else REWARDS.get(name)
    if target is None or (not colon and target.__module__.startswith("flowgrain.")):
        return None
    try:
        return Path(inspect.getfile(target)).read_bytes()
    except (TypeError, OSError):
        return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
