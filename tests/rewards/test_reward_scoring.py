"""Scoring: failures are masked and counted, parts are joined, and threads change no number."""

import math
import threading

import numpy as np
import pytest
import torch

from flowgrain.data import Prompt
from flowgrain.rewards import (
    NOT_FINITE,
    Explanation,
    Scorer,
    Scores,
    Unscored,
    score,
    score_with_parts,
)


def bright(images, prompts):
    return images.mean((1, 2, 3))


def letters(images, prompts):
    return [len(prompt.text) for prompt in prompts]


def test_a_broken_image_has_no_score():
    images = torch.rand(3, 3, 32, 32)
    images[1, 0, 0, 0] = torch.nan
    scores = score(lambda images, prompts: [1.0] * len(images), images, ["a"] * 3)
    assert scores.values.isnan().tolist() == [False, True, False]
    assert (scores.failed, scores.reason) == (1, NOT_FINITE)


def raising(images, prompts):
    raise ConnectionError("server gone")


class Odd:
    def __array__(self, *_, **__):
        raise RuntimeError("odd")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (raising, "ConnectionError: server gone"),
        (lambda images, prompts: [math.nan] * len(images), "NaN"),
        (lambda images, prompts: [1.0], r"returned shape \[1\] for 2 images, not \[2\]"),
        (lambda images, prompts: torch.zeros(2, 1), r"returned shape \[2, 1\] for 2 images"),
        (lambda images, prompts: "good", "returned texts such as 'good', not numbers"),
        (lambda images, prompts: ["good"] * 2, "returned texts such as 'good', not numbers"),
        (
            lambda images, prompts: 1.0,
            r"one number for 2 images. Return one per image, for example",
        ),
        (lambda images, prompts: None, r"returned None. Add a return statement"),
        (lambda images, prompts: Odd(), r"returned Odd, not a list of numbers \(odd\)"),
        (lambda images, prompts: [prompt.nothing for prompt in prompts], "AttributeError"),
    ],
)
def test_a_failure_masks_the_images_of_its_call(reward, reason):
    scores = score(reward, torch.rand(2, 3, 2, 2), ["a", "b"])
    assert scores.values.isnan().all()
    assert scores.failed == 2
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(scores.reason)


@pytest.mark.parametrize("change", ["torch", "numpy"])
def test_a_reward_that_changes_its_images_does_not_change_those_of_others(change):
    def poison(images, prompts):
        if change == "torch":
            images.zero_()
        else:
            images.numpy()[:] = float("nan")
        return [1.0] * len(images)

    images = torch.rand(5, 3, 4, 4)
    before = images.clone()
    with Scorer({"poison": poison, "bright": bright}, {"poison": 2}, background=False) as scorer:
        scorer.submit(images, list("abcde"))
        results = scorer.results()
    assert torch.equal(images, before)
    assert torch.equal(results["bright"].values, bright(before, None))
    assert results["poison"].failed == 0


def fails_on_this_line(images, prompts):
    return torch.ones(2) @ torch.ones(3)


def test_a_failure_names_the_line_of_the_user():
    """The innermost line of the user's code, not a line of torch or of this package."""
    reason = score(lambda i, p: fails_on_this_line(i, p), torch.rand(2, 3, 2, 2), ["a", "b"]).reason
    line = fails_on_this_line.__code__.co_firstlineno + 1
    assert reason.startswith("RuntimeError: ")
    assert reason.endswith(f"({__file__}, line {line})")


def test_a_reward_keeps_the_scores_that_it_has_and_is_given_up():
    calls = []

    def gives_up(images, prompts):
        calls.append(prompts[0].text)
        raise Unscored("server gone", [1.0, math.nan], gave_up=True)

    with Scorer({"gives up": gives_up}, {"gives up": 2}, background=False) as scorer:
        scorer.submit(torch.rand(4, 3, 2, 2), list("abcd"))
        scorer.submit(torch.rand(2, 3, 2, 2), list("ef"))
        scores = scorer.results()["gives up"]
    assert calls == ["a"]
    assert scores.values.isnan().tolist() == [False] + [True] * 5
    assert (scores.failed, scores.reason) == (5, "server gone")


def test_an_error_is_a_better_reason_than_nan():
    parts = [Scores(torch.tensor([torch.nan]), 1, reason) for reason in (NOT_FINITE, "500")]
    assert Scores.concatenate(parts).reason == "500"


def test_no_images_have_no_scores():
    assert score(bright, torch.rand(0, 3, 2, 2), []).values.shape == (0,)


def test_a_failure_does_not_reach_other_calls():
    def flaky(images, prompts):
        if prompts[0].text == "c":
            raise ValueError("c")
        return bright(images, prompts)

    images = torch.rand(5, 3, 2, 2)
    scores = score(flaky, images, list("abcde"), batch_size=2)
    assert scores.values.isnan().tolist() == [False, False, True, True, False]
    assert torch.equal(scores.values[[0, 1, 4]], bright(images, None)[[0, 1, 4]])
    assert scores.failed == 2
    assert scores.reason.startswith(f"ValueError: c ({__file__}, line ")


def test_scores_are_float32_on_the_cpu():
    for returned in ([1, 2], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)):
        scores = score(lambda images, prompts, r=returned: r, torch.zeros(2, 3, 2, 2), ["a", "b"])
        assert torch.equal(scores.values, torch.tensor([1.0, 2.0]))


def test_prompts_have_their_fields():
    def tagged(images, prompts):
        return [prompt.fields.get("tag", 0) for prompt in prompts]

    scores = score(tagged, torch.zeros(2, 3, 2, 2), [Prompt("a", {"tag": 3}), "b"])
    assert scores.values.tolist() == [3, 0]


class Parts:
    """By part: the first letter of the prompt."""

    mean_of_parts = True

    def __call__(self, images, prompts):
        return self.explain(images, prompts).scores

    def explain(self, images, prompts):
        if any(prompt.text == "fail" for prompt in prompts):
            raise ValueError("fail")
        names = {prompt.text[0] for prompt in prompts}
        rows = {
            name: torch.tensor([prompt.text[0] == name for prompt in prompts]) for name in names
        }
        parts = {name: torch.where(rows[name], 2.0, torch.nan) for name in names}
        weights = {name: 3.0 * rows[name] for name in names if name != "b"}
        return Explanation(bright(images, prompts), parts, weights)


def test_parts_of_several_calls():
    images = torch.rand(6, 3, 2, 2)
    images[1, 0, 0, 0] = torch.inf
    prompts = ["a", "a", "b", "a", "fail", "b"]
    scores, parts, weights = score_with_parts(Parts(), images, prompts, batch_size=2)
    assert scores.values.isnan().tolist() == [False, True, False, False, True, True]
    assert parts["a"].nan_to_num(-1).tolist() == [2, -1, -1, 2, -1, -1]
    assert parts["b"].nan_to_num(-1).tolist() == [-1, -1, 2, -1, -1, -1]
    assert weights["a"].tolist() == [3, 3, 0, 3, 0, 0]
    assert list(weights) == ["a"]


def test_a_reward_without_parts():
    images = torch.rand(3, 3, 2, 2)
    scores, parts, weights = score_with_parts(bright, images, ["a"] * 3, batch_size=2)
    assert torch.equal(scores.values, score(bright, images, ["a"] * 3).values)
    assert parts == weights == {}


@pytest.mark.parametrize(
    ("explain", "reason"),
    [
        (lambda images, prompts: torch.zeros(len(images)), "no attribute 'parts'"),
        (
            lambda images, prompts: Explanation([1.0] * len(images), {"half": torch.zeros(1)}),
            "part 'half' has 1 values for 3",
        ),
    ],
)
def test_a_wrong_explanation_masks_the_images(explain, reason):
    odd = Parts()
    odd.explain = explain
    scores, parts, _ = score_with_parts(odd, torch.zeros(3, 3, 2, 2), ["a", "b", "c"])
    assert scores.failed == 3
    assert reason in scores.reason
    assert parts == {}


def test_concatenated_scores():
    parts = [
        Scores(torch.tensor([1.0]), 0, None),
        Scores(torch.tensor([torch.nan]), 1, "x"),
        Scores(torch.tensor([torch.nan]), 1, "y"),
    ]
    scores = Scores.concatenate(parts)
    assert scores.values.nan_to_num(-1).tolist() == [1, -1, -1]
    assert (scores.failed, scores.reason) == (2, "x")


@pytest.mark.parametrize("background", [True, False])
def test_chunks_give_the_scores_of_all_images(background):
    images, prompts = torch.rand(7, 3, 4, 4), [str(10**i) for i in range(7)]
    rewards = {"bright": bright, "letters": letters, "raising": raising}
    with Scorer(rewards, {"letters": 2}, background) as scorer:
        for start in (0, 3, 6):
            scorer.submit(images[start : start + 3], prompts[start : start + 3])
        results = scorer.results()
    for name, reward in rewards.items():
        expected = score(reward, images, prompts)
        assert torch.equal(results[name].values.nan_to_num(-1), expected.values.nan_to_num(-1))
        assert results[name].failed == expected.failed


def test_the_background_does_not_wait_for_a_reward():
    """The first chunk waits for an event that is set after the second is submitted."""
    submitted, waited = threading.Event(), []

    def patient(images, prompts):
        if not waited:
            waited.append(submitted.wait(20))
        return bright(images, prompts)

    images = torch.rand(4, 3, 4, 4)
    with Scorer({"patient": patient}) as scorer:
        scorer.submit(images[:2], ["a", "b"])
        scorer.submit(images[2:], ["c", "d"])
        submitted.set()
        assert torch.equal(scorer.results()["patient"].values, bright(images, None))
    assert waited == [True]


def test_a_reward_is_never_called_twice_at_the_same_time():
    running, most, lock = [], [], threading.Lock()
    both = threading.Barrier(2, timeout=20)

    def watched(name):
        def reward(images, prompts):
            with lock:
                running.append(name)
                most.append(running.count(name))
            if prompts[0].text == "first":
                both.wait()  # the other reward runs at the same time
            with lock:
                running.remove(name)
            return bright(images, prompts)

        return reward

    with Scorer({"a": watched("a"), "b": watched("b")}, {"a": 1, "b": 1}) as scorer:
        for prompts in (["first", "x"], ["y", "z"]):
            scorer.submit(torch.rand(2, 3, 2, 2), prompts)
        results = scorer.results()
    assert max(most) == 1
    assert all(scores.failed == 0 for scores in results.values())


def test_batch_sizes_belong_to_rewards():
    sizes = {"a": [], "b": []}
    rewards = {
        name: lambda images, prompts, seen=seen: seen.append(len(images)) or [0.0] * len(images)
        for name, seen in sizes.items()
    }
    with Scorer(rewards, {"a": 2}, background=False) as scorer:
        scorer.submit(torch.rand(5, 3, 2, 2), ["x"] * 5)
    assert sizes == {"a": [2, 2, 1], "b": [5]}
