"""Base class of methods, and the registry of methods.

A method is one class with typed settings, a plan, a credit and an objective.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import field_validator
from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization, RewardMix, Scope
from flowgrain.core.rollout import Noise
from flowgrain.core.tree import Ints, Planner, Tree
from flowgrain.image_data import DataKind
from flowgrain.registry import Registry
from flowgrain.settings import Section, Setting, SettingsError

METHODS: Registry[type["Method"]] = Registry("method", "flowgrain.methods")
M = TypeVar("M", bound=type["Method"])


MAX_UPDATES = 10_000
"""Limit of method.updates_per_rollout."""


class LearningRates(NamedTuple):
    """Published learning rates of a method. None: not published."""

    full: float | None = None
    lora: float | None = None


def register(cls: M) -> M:
    """Class decorator that makes a method available under its `name`."""
    if not getattr(cls, "name", ""):
        raise SettingsError(f"{cls.__name__} has no name. Set the class attribute `name`.")
    METHODS.register(cls.name)(cls)
    return cls


def build_method(values: Mapping[str, Any]) -> "Method":
    """The method named `values["name"]`, with the other values as its options.

    Raises:
        SettingsError: there is no such method.
        pydantic.ValidationError: an option is not valid.
    """
    options = dict(values)
    return METHODS.get(str(options.pop("name"))).model_validate(options)


@dataclass(frozen=True)
class Observation:
    """A scored rollout, the same on every rank, for `Method.observe`.

    Attributes:
        step: training step, from 1.
        prompts: texts of the P prompts.
        tree: tree of all prompts.
        rewards: [I] weighted sums of the rewards of the leaves. NaN marks an image without a score.
        noise: the noise of the rollout, by prompt number and draw.
    """

    step: int
    prompts: Sequence[str]
    tree: Tree
    rewards: Tensor
    noise: Noise


class Method(Section, ABC):
    """A training method: its options and its behavior.

    The default values of the options are the values of the method's paper. A subclass implements
    `plan` and `credit`. Derive from `PolicyGradient` to train stochastic steps, from
    `ForwardProcess` to train on finished images, or from `RewardGradient` to train on the gradient
    of the reward.
    """

    name: ClassVar[str]
    """Name on the command line and in files."""
    title: ClassVar[str] = ""
    """Name in prose, such as "G2RPO"."""
    paper: ClassVar[str] = ""
    """arXiv identifier."""
    summary: ClassVar[str] = ""
    """Explanation of the tree picture in a report."""
    config_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Values of the paper for settings of other sections, by section."""
    learning_rates: ClassVar[LearningRates] = LearningRates()
    """Published learning rates of a full fine-tune and of a LoRA."""
    trains_on: ClassVar[DataKind | None] = None
    """Kind of data set that the method can train on in place of sampled images."""
    unused_on_data: ClassVar[tuple[str, ...]] = ()
    """Options that have no effect with such a data set."""
    not_compared: ClassVar[str] = ""
    """Why a choice among the samples of a prompt makes no sense. Empty: it does."""

    group_size: int = Setting(
        12,
        "Samples per prompt that are compared with each other (G).",
        unit="samples",
        ge=2,
        le=10_000,
    )
    updates_per_rollout: int | Literal["per_step"] = Setting(
        1,
        'Optimizer updates per rollout, or "per_step" for one update per stochastic step.',
        unit="updates",
    )
    kl_weight: float = Setting(
        0.0, "Weight of the KL to the reference model (beta). 0: no KL.", ge=0, le=1000
    )
    tail_order: Literal[1, 2] = Setting(
        1, "Order of the ODE steps after the last stochastic step. 2 is DPM-Solver++(2M)."
    )
    reward_mix: RewardMix = Setting(
        "advantage",
        "How several rewards are combined: weighted sum of their advantages (advantage), or of the "
        "rewards (reward).",
    )
    reward_weights: Literal["as_given", "sum_to_one"] = Setting(
        "as_given",
        "Weights of several rewards: as given, or divided by their sum (sum_to_one).",
        keep=True,
    )
    std_scope: Scope = Setting(
        "group",
        "Standard deviation that normalizes advantages: of the comparison group (group), or of the "
        "whole batch (global).",
    )
    std_unbiased: bool = Setting(True, "Divide by n - 1 instead of n in the standard deviation.")
    std_epsilon: float = Setting(1e-8, "Constant added to the standard deviation.", gt=0, le=100)
    advantage_clip: float = Setting(
        5.0, "Advantages are clamped to this absolute value.", gt=0, le=1e6
    )

    @abstractmethod
    def plan(self, tree: Planner, step: int, seed: int) -> None:
        """Write the tree of one prompt.

        Args:
            tree: planner of the tree. `tree.num_steps` is the length of the sampling grid.
            step: training step, from 1.
            seed: seed of the run.
        """

    @abstractmethod
    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """Advantages [E] of the trained edges, or [I] of the images if the method trains on images.

        Args:
            tree: tree of all prompts.
            rewards: [I] rewards of the leaves. NaN marks an image without a score.
            how: normalization of values to advantages.
        """

    def leaf_groups(self, tree: Tree) -> Ints:
        """Group number [I] of every leaf. A `GroupReward` compares the images of a group.

        Default: leaves of the same prompt and channel.
        """
        return credit.leaf_groups(tree)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the velocity of the model before training."""
        return self.kl_weight > 0

    def observe(self, observation: Observation) -> None:
        """Take from a scored rollout what `credit` needs besides the tree and the rewards.

        `credit` is a function of the tree and the rewards of one rollout. A method whose credit
        also depends on earlier rollouts (DDPO's running statistics per prompt) or on the noise
        (BranchGRPO's weighted values) stores it here. Called once per rollout before `credit`.
        A step that was stopped is observed again after the resume, so the state that
        `state_dict` returns must not count it twice. The default does nothing.
        """

    @property
    def plan_varies(self) -> bool:
        """Whether the tree changes between training steps."""
        return False

    def published_passes(self, num_steps: int) -> int:
        """Sampling forward passes per prompt in the published code. 0: unknown."""
        return 0

    def check(self, num_steps: int) -> None:
        """Check the options against the length of the sampling grid.

        Raises:
            ValueError: an option does not fit. The message starts with the option and its value.
        """

    def check_unused(self, names: Sequence[str], because: str | None = None) -> None:
        """Check that the options `names`, which have no effect, keep their default.

        Args:
            names: names of the options.
            because: setting with which they have no effect. Default: they never have one.

        Raises:
            ValueError: an option was changed.
        """
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                reason = because or f"method {self.name!r}"
                raise ValueError(f"{name}={value}: has no effect with {reason}. Remove it.")

    def normalization(self) -> Normalization:
        """Normalization of values to advantages."""
        return Normalization(self.std_scope, self.std_unbiased, self.std_epsilon)

    def mix_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weight of every reward in the sum, from its configured weight.

        Raises:
            ValueError: the weights cannot be divided by their sum.
        """
        if self.reward_weights == "as_given":
            return dict(weights)
        total = sum(weights.values())
        if total <= 0:
            raise ValueError(
                f"reward_weights=sum_to_one: the weights {dict(weights)} have the sum {total:g}. "
                "Use weights with a positive sum, or method.reward_weights=as_given."
            )
        return {name: weight / total for name, weight in weights.items()}

    def published_learning_rate(self, lora: bool) -> float:
        """The published learning rate of a LoRA or of a full fine-tune.

        Raises:
            ValueError: none was published.
        """
        rate = self.learning_rates.lora if lora else self.learning_rates.full
        if rate is None:
            kind, other = ("LoRA", "full fine-tune") if lora else ("full fine-tune", "LoRA")
            published = self.learning_rates.full if lora else self.learning_rates.lora
            known = f" The rate of a {other} is {published:g}." if published else ""
            raise ValueError(
                f"no learning rate of a {kind} was published for method {self.name!r}.{known} "
                "Set optimizer.learning_rate."
            )
        return rate

    def state_dict(self) -> dict[str, Any]:
        """State of the method that a checkpoint stores, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        if state:
            raise ValueError(f"method {self.name!r} has no state {', '.join(state)}")

    @field_validator("updates_per_rollout")
    @classmethod
    def _at_least_one_update(cls, value: int | str) -> int | str:
        if value != "per_step" and int(value) < 1:
            raise ValueError("must be at least 1, or per_step")
        if value != "per_step" and int(value) > MAX_UPDATES:
            raise ValueError(f"must be at most {MAX_UPDATES}, or per_step")
        return value
