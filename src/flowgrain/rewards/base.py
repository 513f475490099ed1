"""The interface of a reward, the registry of rewards, and the configuration of a reward."""

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from numpy.typing import ArrayLike
from pydantic import ConfigDict, field_validator, model_validator
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.registry import Registry, describe
from flowgrain.rewards.options import OptionError, check_call, checked_options
from flowgrain.settings import Section, Setting, SettingsError, did_you_mean

T = TypeVar("T", bound=Callable[..., Any])


@runtime_checkable
class GroupReward(Protocol):
    """A reward that compares the images of a prompt, and therefore needs all of them in one call.

    A group contains the images of one prompt in a rollout, see `Method.leaf_groups`. Groups are
    never split. An evaluation has one image per prompt, so it leaves such a reward out.
    """

    def score_group(self, images: Tensor, prompt: Prompt) -> "Tensor | ArrayLike":
        """Scores [G] of the images [G, 3, H, W] in 0..1 of a prompt. NaN: no score."""
        ...


Reward = Callable[[Tensor, Sequence[Prompt]], "Tensor | ArrayLike"] | GroupReward
"""A function of images [I, 3, H, W] in 0..1 and I prompts that returns I scores.

NaN marks an image that could not be scored. A reward that compares images is a `GroupReward`.
"""


@dataclass(frozen=True)
class Explanation:
    """Scores of images, and the values of their parts.

    A part is a task, a dimension or a kind of failure. Benchmarks report their results by part.

    Attributes:
        scores: the I scores that a call of the reward returns.
        parts: values [I] by part. NaN: the image does not have this part.
        part_weights: weight [I] of each image in the mean of a part. Default: 1.
    """

    scores: "Tensor | ArrayLike"
    parts: Mapping[str, Tensor]
    part_weights: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Explains(Protocol):
    """A reward that also returns the parts of its scores.

    Attributes:
        mean_of_parts: the overall result of the benchmark is the mean over parts, not over images.
    """

    mean_of_parts: bool

    def explain(self, images: Tensor, prompts: Sequence[Prompt]) -> Explanation:
        """The scores of images [I, 3, H, W] in 0..1, and their parts."""
        ...


class Unscored(Exception):
    """A reward could not score some of the images. The message is the reason.

    A reward raises it to keep the scores that it has. Other exceptions mask all images of the call.

    Attributes:
        result: the scores, or the explanation, NaN for images without a score.
        gave_up: do not call this reward again in the same training step or evaluation.
    """

    def __init__(
        self, reason: str, result: "Tensor | ArrayLike | Explanation", gave_up: bool = False
    ) -> None:
        super().__init__(reason)
        self.result, self.gave_up = result, gave_up


REWARDS: Registry[Callable[..., Any]] = Registry(
    "reward",
    "flowgrain.rewards",
    {
        "oracle": "flowgrain.rewards.shapes:Oracle",
        "towers": "flowgrain.rewards.shapes:Towers",
        "preference": "flowgrain.rewards.shapes:Preference",
        "clip": "flowgrain.rewards.clip:ClipScore",
        "pickscore": "flowgrain.rewards.clip:PickScore",
        "hps": "flowgrain.rewards.hps:HPS",
        "aesthetic": "flowgrain.rewards.aesthetic:Aesthetic",
        "imagereward": "flowgrain.rewards.imagereward:ImageReward",
        "ocr": "flowgrain.rewards.ocr:OCR",
        "geneval": "flowgrain.rewards.geneval:GenEval",
        "judge": "flowgrain.rewards.judge:Judge",
        "unifiedreward": "flowgrain.rewards.judge:UnifiedReward",
        "unigenbench": "flowgrain.rewards.unigenbench:UniGenBench",
        "pairwise": "flowgrain.rewards.pairwise:Pairwise",
        "remote": "flowgrain.rewards.remote:Remote",
    },
)
"""Classes and functions of rewards by name. A class is called with the options of the reward."""

MIN_WEIGHT = 1e-9
"""Smallest absolute weight of a reward."""
SHAPES_REWARDS = ("oracle", "towers", "preference")
"""The rewards of the bundled shapes model."""


def register_reward(name: str) -> Callable[[T], T]:
    """Decorator that registers a class or a function as the reward `name`.

    The options of a class are the arguments of its `__init__`. The options of a function are its
    keyword-only arguments.

    Example:
        >>> @register_reward("brightness")
        ... def brightness(images, prompts, *, target: float = 0.5):
        ...     return -(images.mean((1, 2, 3)) - target).abs()

    Raises:
        SettingsError: another reward has this name.
    """

    def add(reward: T) -> T:
        REWARDS.register(name)(reward)
        return reward

    return add


class RewardConfig(Section):
    """Configuration of a reward.

    All keys other than the fields below are options of the reward. They become keyword arguments of
    its class or function. A plain name is short for a mapping with only this name.

    Example:
        >>> RewardConfig(name="clip", weight=0.5, path="openai/clip-vit-base-patch32")
    """

    model_config = ConfigDict(extra="allow")

    name: str = Setting(
        ...,
        "Name of a registered reward, or package.module:attribute for a custom reward.",
        keep=True,
    )
    weight: float = Setting(
        1.0, "Weight of this reward in the total reward.", keep=True, ge=-1e6, le=1e6
    )
    batch_size: int = Setting(
        256, "Images in one call of the reward.", unit="images", ge=1, le=100_000
    )

    @model_validator(mode="before")
    @classmethod
    def _mapping_from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("weight")
    @classmethod
    def _not_zero(cls, weight: float) -> float:
        if abs(weight) < MIN_WEIGHT:
            raise ValueError(
                "the reward would have no effect on training. Remove it from rewards, or list it "
                "in evaluation.rewards to only evaluate it"
            )
        return weight

    @property
    def options(self) -> dict[str, Any]:
        """The options of the reward."""
        return dict(self.model_extra or {})


def build_reward(config: RewardConfig) -> Reward:
    """The reward that `config` describes.

    A class is called with the options. For a function, `functools.partial` binds the options.

    Raises:
        SettingsError: there is no such reward, an option is unknown or has the wrong type, or the
            reward cannot be loaded.
    """
    place = f"rewards[{config.name}]"
    reward = build_registered(
        REWARDS, place, config.name, config.options, reserved=RewardConfig.model_fields
    )
    if not isinstance(reward, GroupReward):
        return check_call(config.name, _callable(place, "reward", reward))
    if config.batch_size != RewardConfig.model_fields["batch_size"].default:
        raise SettingsError(
            f"{place}.batch_size={config.batch_size}: has no effect, because this reward scores "
            "all images of a prompt in one call. Remove it."
        )
    return reward


def build_registered(
    registry: Registry[Callable[..., Any]],
    place: str,
    name: str,
    options: Mapping[str, Any],
    reserved: Collection[str],
) -> Any:
    """The object that the class or function `name` gives with `options`.

    A class is called with the options. For a function, `functools.partial` binds the options.

    Args:
        registry: registry of the names. Other names are package.module:attribute.
        place: path of the setting, for error messages.
        name: name of the class or function.
        options: YAML values by name.
        reserved: names that options cannot have.

    Raises:
        SettingsError: there is no such object, an option is unknown or has the wrong type, or the
            class raised an error. The message starts with `place`.
    """
    target = _find(registry, place, name)
    checked = checked_options(place, target, options, reserved)
    if not isinstance(target, type):
        return functools.partial(target, **checked) if checked else target
    try:
        return target(**checked)
    except OptionError as error:
        raise SettingsError(f"{place}.{error}") from error
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from error
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise SettingsError(f"{place}: {describe(error)}") from error


def _find(registry: Registry[Callable[..., Any]], place: str, name: str) -> Callable[..., Any]:
    """The class or function `name`."""
    if name in registry:
        return registry.get(name)
    kind = registry.kind
    fix = f"Write a custom {kind} as package.module:attribute."
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), attribute]
    if colon and not all(part.isidentifier() for part in parts):
        raise SettingsError(f"{place}: not the name of a {kind}. {fix}")
    if not colon:
        raise SettingsError(
            f"{place}: there is no {kind} {name!r}. {did_you_mean(name, registry)} "
            f"{fix[:-1]}, or load the file that registers it with --plugin FILE.py."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # custom rewards are often in the working directory
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise SettingsError(f"{place}: cannot be imported: {describe(error)}. {fix}") from error
    return _callable(place, kind, target)


def _callable(place: str, kind: str, thing: Any) -> Callable[..., Any]:
    if not callable(thing):
        raise SettingsError(
            f"{place}: an object of type {type(thing).__name__} is not callable. "
            f"A {kind} is a function, or a class with a __call__ method."
        )
    return cast(Callable[..., Any], thing)
