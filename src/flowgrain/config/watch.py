"""The section `watch`: which monitors are compared with the base model, and what an alarm does."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator

from flowgrain.monitors import MONITORS
from flowgrain.settings import Section, Setting, StrTuple, did_you_mean

FEATURE_MONITORS = ("feature_distance", "diversity")
"""Monitors that need a feature network."""


class WatchConfig(Section):
    """Monitors that are never trained on, and the rule for an alarm.

    An evaluation raises an alarm if the trained reward is significantly above the base model, and a
    monitor or a reward that is not trained is significantly worse than the base model by more than
    the threshold.
    """

    monitor: Literal["all"] | StrTuple = Setting(
        "all",
        "Monitors and rewards that are not trained which can raise an alarm: a list of names, or "
        "all (except latent_norm). Others are only recorded.",
    )
    direction: Literal["worse", "up", "down", "change"] = Setting(
        "worse",
        "Direction of an alarm. worse: the direction that is worse for each monitor, and down for "
        "a reward.",
    )
    threshold: float = Setting(
        1.5,
        "Change of a monitor that is allowed, in standard deviations of the base model's images. "
        "For feature_distance and path_kl: in their own units.",
        ge=0,
        le=1e6,
    )
    reward_threshold: float = Setting(
        0.0,
        "Change of a reward that is not trained that is allowed, in standard deviations of the "
        "base model's scores. 0: any significant change.",
        ge=0,
        le=1e6,
    )
    patience: int = Setting(
        1, "Evaluations in a row until an alarm is raised.", unit="evaluations", ge=1, le=10_000
    )
    action: Literal["warn", "stop", "lower_learning_rate", "off"] = Setting(
        "warn",
        "What an alarm does: a warning, a stop after the checkpoint is saved, or half of the "
        "learning rate. off: nothing is measured.",
    )
    features: Literal["auto", "shapes", "clip", "none"] = Setting(
        "auto",
        "Network for feature_distance and diversity: the bundled network for the bundled model "
        "(shapes), watch.clip (clip), or none. auto: clip if watch.clip is set, shapes for the "
        "bundled model, otherwise none.",
    )
    clip: str | None = Setting(
        None,
        "Directory or Hugging Face repository of a CLIP or SigLIP model, whose image embeddings "
        "are the features. Default: no such model.",
    )

    @field_validator("action", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads off as false

    @field_validator("monitor", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and value != "all" else value

    def check(self, trained: Sequence[str], held_out: Sequence[str]) -> None:
        """Check the names of monitors and the feature network.

        Args:
            trained: names of the trained rewards.
            held_out: names of the rewards that are only evaluated.

        Raises:
            ValueError: a name is not known, belongs to a trained reward or is not measured, or
                settings of the feature network contradict each other.
        """
        if not self.monitor:
            raise ValueError(
                "watch.monitor=[]: nothing can raise an alarm. Name monitors, or set "
                "watch.action=off to measure nothing."
            )
        for name in () if self.monitor == "all" else self.monitor:
            if name in trained:
                raise ValueError(
                    f"watch.monitor: {name!r} is trained. Name monitors, or rewards that are only "
                    "in evaluation.rewards."
                )
            known = [*MONITORS, *held_out]
            if name not in known:
                raise ValueError(
                    f"watch.monitor: there is no monitor or evaluated reward {name!r}. "
                    f"{did_you_mean(name, known)}"
                )
            if self.features == "none" and name in FEATURE_MONITORS:
                raise ValueError(
                    f"watch.monitor: {name!r} needs a feature network, and watch.features is none. "
                    "Set watch.features, or remove this monitor."
                )
        if self.features == "clip" and self.clip is None:
            raise ValueError(
                "watch.features=clip: needs the weights of a model. Set watch.clip to a directory "
                "or a Hugging Face repository, such as openai/clip-vit-base-patch32."
            )
        if self.clip is not None and self.features in ("shapes", "none"):
            raise ValueError(
                f"watch.clip={self.clip}: has no effect with watch.features={self.features}. "
                "Remove one of the two settings."
            )


def check_name(reward: str) -> None:
    """Check that a reward does not have the name of a monitor or of the monitors' metrics.

    Raises:
        ValueError: it does.
    """
    if reward == "monitor" or reward in MONITORS:
        raise ValueError(
            f"rewards: {reward!r} is the name of {'a monitor' if reward in MONITORS else 'metrics'}"
            f". Give the reward another name, such as {reward}_reward."
        )
