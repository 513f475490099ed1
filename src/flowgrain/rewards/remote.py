"""The reward `remote`: the client of a reward server.

Letters: I images.
"""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.rewards.base import Unscored
from flowgrain.rewards.http_client import ScoringCall, Server, ServerError, check_url, encode_png
from flowgrain.rewards.messages import TOKEN_VARIABLE, RawImages, ScoreRequest, ScoreResponse


class Remote:
    """A reward that `flowgrain serve` computes on another machine.

    A request that fails or exceeds `timeout` is repeated; after that, its images have no score
    (NaN). After two failed requests in a row, or at `deadline`, the server is not used again in the
    same training step. If the environment variable FLOWGRAIN_TOKEN is set, it is sent as the bearer
    token.

    Args:
        url: address of the server, such as http://HOST:8600.
        reward: name of the reward on the server.
        encoding: "raw" sends the exact float32 values. "png" rounds to 8 bits and is smaller.
        request_size: images in a request.
        timeout: longest time of one request with its complete answer, in seconds.
        deadline: longest time of a scoring call with all its requests, in seconds.
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
        deadline: PositiveFloat = 300.0,
        retries: NonNegativeInt = 3,
        backoff: NonNegativeFloat = 0.5,
    ) -> None:
        self.url = check_url(url, "http://HOST:8600")
        self.reward, self.encoding, self.request_size = reward, encoding, request_size
        self.server = Server(
            f"{self.url}/score",
            TOKEN_VARIABLE,
            timeout=timeout,
            deadline=deadline,
            retries=retries,
            backoff=backoff,
        )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, H, W] in 0..1.

        Raises:
            Unscored: the server did not score all images.
        """
        scores, size, reason = torch.full((len(images),), torch.nan), self.request_size, None
        with ScoringCall(self.server) as call:
            for i in range(0, len(images), size):
                if call.gave_up:
                    break
                try:
                    response = self._score(call, images[i : i + size], prompts[i : i + size])
                except ServerError:
                    continue  # its images stay NaN
                values = [float("nan") if value is None else value for value in response.scores]
                scores[i : i + size] = torch.tensor(values)
                reason = reason or response.reason
        if not scores.isfinite().all():
            given = f"{self.server}: {reason or 'it returned images without a finite score'}"
            raise Unscored(call.reason or given, scores, call.gave_up)
        return scores

    def _score(self, call: ScoringCall, images: Tensor, prompts: Sequence[Prompt]) -> ScoreResponse:
        fields = [dict(prompt.fields) for prompt in prompts]
        request = ScoreRequest(
            reward=self.reward,
            prompts=[prompt.text for prompt in prompts],
            fields=fields if any(fields) else None,
            **_encode(images, self.encoding),
        )

        def parse(answer: bytes) -> ScoreResponse:
            response = ScoreResponse.model_validate_json(answer)
            if len(response.scores) != len(prompts):
                raise ValueError(f"{len(response.scores)} scores for {len(prompts)} images")
            return response

        return call.post(request.model_dump_json(exclude_none=True).encode(), parse)


def _encode(images: Tensor, encoding: Literal["raw", "png"]) -> dict[str, Any]:
    """The images of a `ScoreRequest`."""
    if encoding == "png":
        return {"png": [base64.b64encode(encode_png(image)).decode() for image in images]}
    count, channels, height, width = images.shape
    values = images.float().cpu().contiguous().numpy().astype("<f4")
    data = base64.b64encode(values.tobytes()).decode()
    return {"raw": RawImages(shape=(count, channels, height, width), data=data)}
