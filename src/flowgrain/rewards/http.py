"""What rewards over HTTP share: an address, a session that tries again, an image as PNG."""

import io
import os

import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util.retry import Retry

from flowgrain.rewards.base import RewardSource


def address(source: RewardSource, reward: str, example: str) -> tuple[str, str]:
    """URL and name of `http://...#NAME`. Raises ValueError, with `example`, for what is no address."""
    url, _, name = (source.model or "").partition("#")
    if not url.startswith(("http://", "https://")) or not name:
        raise ValueError(f"reward_models: {reward}={source.model} is no address; write {reward}={example}")
    return url.rstrip("/"), name


def session(token: str, retries: int, backoff: float, connections: int = 1) -> requests.Session:
    """Tries `retries` more times, with back-off, on a lost connection, 429 or 5xx; bears the token of the variable `token`."""
    retry = Retry(
        retries,
        backoff_factor=backoff,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
        respect_retry_after_header=False,
    )  # a server does not say how long a trainer waits
    made = requests.Session()
    for scheme in ("http://", "https://"):
        made.mount(scheme, HTTPAdapter(pool_maxsize=connections, max_retries=retry))
    if os.environ.get(token):
        made.headers["Authorization"] = f"Bearer {os.environ[token]}"
    return made


def png(image: Tensor) -> bytes:
    """An image [3, H, W] in 0..1 as PNG."""
    file = io.BytesIO()
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(file, format="png")
    return file.getvalue()
