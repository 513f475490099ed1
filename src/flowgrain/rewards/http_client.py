"""HTTP requests of rewards: addresses, retries, tokens and PNG images."""

import io
import os

import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util.retry import Retry

from flowgrain.rewards.options import OptionError


def check_url(url: str, example: str) -> str:
    """`url` without a slash at the end.

    Raises:
        OptionError: `url` is not an HTTP address. The message contains `example`.
    """
    if not url.startswith(("http://", "https://")):
        raise OptionError(f"url={url}: not an HTTP address. Write an address such as {example}.")
    return url.rstrip("/")


def open_session(
    token_variable: str, retries: int, backoff: float, connections: int = 1
) -> requests.Session:
    """A session that repeats failed requests.

    A request is repeated after a connection error, and after the statuses 429, 500, 502, 503, 504.

    Args:
        token_variable: environment variable with a bearer token. Without it, no token is sent.
        retries: number of repetitions.
        backoff: factor of the exponential waiting time between repetitions, in seconds.
        connections: number of connections that are kept open.
    """
    retry = Retry(
        retries,
        backoff_factor=backoff,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
        respect_retry_after_header=False,  # a server must not stop a training run for hours
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=connections, max_retries=retry))
    if os.environ.get(token_variable):
        session.headers["Authorization"] = f"Bearer {os.environ[token_variable]}".encode()
    return session


def encode_png(image: Tensor) -> bytes:
    """An image [3, H, W] in 0..1 as a PNG file."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()
