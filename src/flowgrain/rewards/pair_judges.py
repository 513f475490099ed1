"""Pairwise judges: the difference of two scores, and a vision-language model that sees both images.

Letters: G images of a group, K pairs.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from flowgrain.core.tree import Ints
from flowgrain.data import Prompt
from flowgrain.rewards.base import REWARDS, RewardConfig, Unscored, build_reward
from flowgrain.rewards.http_client import ScoringCall
from flowgrain.rewards.judge import ChatModel, data_url
from flowgrain.rewards.options import OptionError
from flowgrain.rewards.scoring import Scores, score


class ScoreDifference:
    """Preference by another reward: the logistic function of the difference of two scores.

    For a Bradley-Terry model such as `preference`, this is the probability of the model.

    Args:
        reward: name of a reward, or a mapping with its name, `batch_size` and options.
    """

    def __init__(self, reward: str | dict[str, Any] = "preference") -> None:
        if isinstance(reward, Mapping) and "weight" in reward:
            raise OptionError("reward.weight: has no effect on comparisons. Remove it.")
        try:
            config = RewardConfig.model_validate(reward)
        except ValidationError as error:
            raise OptionError(f"reward={reward}: {error.errors()[0]['msg']}.") from error
        if config.name in REWARDS:  # before its options are checked
            _check_scores(config.name, REWARDS.get(config.name))
        self.reward, self.batch_size = build_reward(config), config.batch_size
        _check_scores(config.name, self.reward)
        self._last: tuple[Tensor, Scores] | None = None

    def __call__(self, images: Tensor, pairs: Ints, prompt: Prompt) -> Tensor:
        """Preferences [K] for the first image of each of the `pairs` [K, 2].

        Raises:
            Unscored: the reward failed on some of the images.
        """
        if self._last is None or self._last[0] is not images:  # calls for a group share `images`
            prompts = [prompt] * len(images)
            self._last = images, score(self.reward, images, prompts, self.batch_size)
        scores = self._last[1]
        values = scores.values.double()
        preferences = torch.sigmoid(values[pairs[:, 0]] - values[pairs[:, 1]])
        if scores.reason is not None:
            raise Unscored(scores.reason, preferences, scores.gave_up)
        return preferences


def _check_scores(name: str, reward: object) -> None:
    """Check that a reward scores images one by one.

    Raises:
        OptionError: it compares images.
    """
    if hasattr(reward, "score_group"):
        raise OptionError(
            f"reward={name}: compares images itself, so it cannot be the score of a judge. "
            "Use another reward."
        )


def parse_choice(answer: str, answers: tuple[str, str, str] = ("A", "B", "tie")) -> float:
    """The choice in an answer: 1 for the first image, 0 for the second, 0.5 for a tie.

    The choice is the last line that is not empty. It must be one of `answers`. Case, quotation
    marks, asterisks and a final period are ignored.

    Args:
        answer: the text that the model returned.
        answers: texts that choose the first image, the second image, and neither.

    Returns:
        The choice, NaN for any other text.
    """
    lines = answer.strip().splitlines() or [""]
    text = lines[-1].strip(" \t\"'`*.").casefold()
    known = {name.casefold(): value for name, value in zip(answers, (1.0, 0.0, 0.5), strict=True)}
    return known.get(text, float("nan"))


class ChatJudge(ChatModel):
    """Preference of a vision-language model that sees both images, the first image first.

    The last line of the answer must be A, B or tie, see `parse_choice`. Any other answer is a
    failed comparison. The server and its limits are those of the reward `judge`.

    Args:
        url: address of the API, such as http://HOST:PORT/v1.
        model: name of the model on the server.
        template: text file with the question. `{prompt}` is replaced by the prompt. Default: a
            question of this library.
        concurrency: number of requests at the same time.
        timeout: longest time of one request with its complete answer, in seconds.
        deadline: longest time of a call with all its pairs, in seconds.
        retries: repetitions of a failed request.
        backoff: factor of the exponential waiting time between repetitions, in seconds.
    """

    answers: ClassVar[tuple[str, str, str]] = ("A", "B", "tie")
    question: ClassVar[str] = (
        "Two images were made from the same text. The first image is A, the second image is B. "
        "Text: {prompt}\n"
        "Which image is better? Consider first whether it shows what the text says, then how good "
        "it looks. Answer with one word: A, B or tie."
    )

    def __call__(self, images: Tensor, pairs: Ints, prompt: Prompt) -> Tensor:
        """Preferences [K] for the first image of each of the `pairs` [K, 2].

        Raises:
            Unscored: the server did not answer all requests, or an answer is not a choice.
        """
        urls = {int(i): data_url(images[i]) for i in np.unique(pairs)}
        question = self.fill_template(prompt=prompt.text)

        def answer_to(call: ScoringCall, k: int) -> str:
            return self.ask(call, [urls[int(i)] for i in pairs[k]], question)

        answers, call = self.map_images(answer_to, len(pairs))
        choices = [parse_choice(answer or "", self.answers) for answer in answers]
        preferences, reason = torch.tensor(choices, dtype=torch.float64), call.reason
        if reason is None and preferences.isnan().any():
            unread = str(answers[int(preferences.isnan().nonzero()[0])])
            names = ", ".join(self.answers[:2])
            short = " ".join(unread.split())[-100:]
            reason = f"{self.server} answered {short!r}, not {names} or {self.answers[2]}"
        if reason is not None:
            raise Unscored(reason, preferences, call.gave_up)
        return preferences
