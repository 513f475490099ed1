"""The reward `remote`: the client of a reward server.

Letters: I images.
"""

import base64
import logging
from collections.abc import Sequence
from typing import Any, Literal

import requests
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.rewards.http_client import check_url, encode_png, open_session
from flowgrain.rewards.messages import TOKEN_VARIABLE, RawImages, ScoreRequest, ScoreResponse

log = logging.getLogger(__name__)


class Remote:
    """A reward that `flowgrain serve` computes on another machine.

    A request that fails or exceeds `timeout` is repeated; after that, its images have no score
    (NaN). If the environment variable FLOWGRAIN_TOKEN is set, it is sent as the bearer token.

    Args:
        url: address of the server, such as http://HOST:8600.
        reward: name of the reward on the server.
        encoding: "raw" sends the exact float32 values. "png" rounds to 8 bits and is smaller.
        request_size: images in a request.
        timeout: longest time to wait for a response, in seconds.
        retries: repetitions of a failed request.
        backoff: factor of the exponential waiting time between repetitions, in seconds.
    """

    def __init__(
        self,
        url: str,
        reward: str,
        encoding: Literal["raw", "png"] = "raw",
        request_size: PositiveInt = 64,
        timeout: PositiveFloat = 120.0,
        retries: NonNegativeInt = 3,
        backoff: NonNegativeFloat = 0.5,
    ) -> None:
        self.url = check_url(url, "http://HOST:8600")
        self.reward, self.encoding = reward, encoding
        self.request_size, self.timeout = request_size, timeout
        self.session = open_session(TOKEN_VARIABLE, retries, backoff)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, H, W] in 0..1. NaN where the server returned none."""
        size = self.request_size
        starts = range(0, len(images), size)
        return torch.cat([self._score(images[i : i + size], prompts[i : i + size]) for i in starts])

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        fields = [dict(prompt.fields) for prompt in prompts]
        try:
            request = ScoreRequest(
                reward=self.reward,
                prompts=[prompt.text for prompt in prompts],
                fields=fields if any(fields) else None,
                **_encode(images, self.encoding),
            )
            body = request.model_dump(mode="json", exclude_none=True)
            response = self.session.post(f"{self.url}/score", json=body, timeout=self.timeout)
            response.raise_for_status()
            scores = ScoreResponse.model_validate(response.json()).scores
            if len(scores) != len(prompts):
                raise ValueError(f"{len(scores)} scores for {len(prompts)} images")
        except (requests.RequestException, ValueError) as error:
            log.warning("The reward server at %s returned no scores: %s", self.url, error)
            return torch.full((len(prompts),), torch.nan)
        return torch.tensor([float("nan") if value is None else value for value in scores])


def _encode(images: Tensor, encoding: Literal["raw", "png"]) -> dict[str, Any]:
    """The images of a `ScoreRequest`."""
    if encoding == "png":
        return {"png": [base64.b64encode(encode_png(image)).decode() for image in images]}
    count, channels, height, width = images.shape
    values = images.float().cpu().contiguous().numpy().astype("<f4")
    data = base64.b64encode(values.tobytes()).decode()
    return {"raw": RawImages(shape=(count, channels, height, width), data=data)}
