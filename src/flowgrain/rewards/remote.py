"""The reward `remote`: the client of a reward server, or of several servers with the same reward.

Letters: I images.
"""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.rewards.addresses import check_urls
from flowgrain.rewards.base import Unscored
from flowgrain.rewards.http_client import ScoringCall, Server, ServerError, encode_png
from flowgrain.rewards.messages import TOKEN_VARIABLE, RawImages, ScoreRequest, ScoreResponse
from flowgrain.rewards.options import OptionError
from flowgrain.rewards.replica_call import ReplicaCall
from flowgrain.rewards.replicas import Replicas
from flowgrain.rewards.workers import map_in_threads


class Remote:
    """A reward that `flowgrain serve` computes on other machines.

    A request that fails or exceeds `timeout` is repeated; after that, its images have no score
    (NaN). After two failed requests in a row, or at `deadline`, the server is not used again in the
    same training step. If the environment variable FLOWGRAIN_TOKEN is set, it is sent as the bearer
    token.

    With several addresses, all servers must serve the same reward. There are as many requests at
    the same time as addresses. A request only fails if it failed on every server.

    Args:
        url: address of the server, such as http://HOST:8600, or a list of addresses.
        reward: name of the reward on the server.
        encoding: "raw" sends the exact float32 values. "png" rounds to 8 bits and is smaller.
        request_size: images in a request.
        timeout: longest time of one request with its complete answer, in seconds.
        deadline: longest time of a scoring call with all its requests, in seconds.
        retries: repetitions of a failed request. With several addresses: on all of them.
        backoff: factor of the exponential waiting time between repetitions, in seconds.
        hedge_after: with several addresses, time in seconds after which a second server gets the
            same request, and the first answer counts. "p95": the 95% quantile of the last 200
            answers, after 20 answers.
    """

    def __init__(
        self,
        url: str | list[str],
        reward: str,
        encoding: Literal["raw", "png"] = "raw",
        request_size: PositiveInt = 64,
        timeout: PositiveFloat = 120.0,
        deadline: PositiveFloat = 300.0,
        retries: NonNegativeInt = 3,
        backoff: NonNegativeFloat = 0.5,
        hedge_after: PositiveFloat | Literal["p95", "never"] = "p95",
    ) -> None:
        self.urls = check_urls(url, "http://HOST:8600")
        self.reward, self.encoding, self.request_size = reward, encoding, request_size
        limits = {"timeout": timeout, "deadline": deadline, "retries": retries, "backoff": backoff}
        if len(self.urls) > 1:
            self.server: Server = Replicas(self.urls, reward, TOKEN_VARIABLE, hedge_after, **limits)
            return
        if hedge_after != "p95":
            raise OptionError(
                f"hedge_after={hedge_after}: has no effect with one address. Remove it, or list "
                "more addresses in url."
            )
        self.server = Server(
            f"{self.urls[0]}/score",
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
        size, server = self.request_size, self.server
        starts = range(0, len(images), size)

        def request(first: int) -> ScoreResponse | None:
            if call.gave_up:
                return None
            part = slice(first, first + size)
            try:
                return self._score(call, images[part], prompts[part])
            except ServerError:
                return None  # its images stay NaN

        with ReplicaCall(server) if isinstance(server, Replicas) else ScoringCall(server) as call:
            threads = min(len(self.urls), max(len(starts), 1))
            responses = map_in_threads(request, starts, threads)
        scores, reason = torch.full((len(images),), torch.nan), None
        for first, response in zip(starts, responses, strict=True):
            if response is not None:
                values = [float("nan") if value is None else value for value in response.scores]
                scores[first : first + size] = torch.tensor(values)
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
