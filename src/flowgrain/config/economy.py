"""Settings that spend the samples of a rollout where they teach most, and their checks."""

from typing import TYPE_CHECKING, Literal

from flowgrain.config.limits import MAX_STEPS
from flowgrain.core.cost import tail_length
from flowgrain.core.explore import branch_groups, candidates_of, choice_groups
from flowgrain.core.tree import MAX_ROWS, ROOT, Tree
from flowgrain.methods import ForwardProcess
from flowgrain.settings import Section, Setting

if TYPE_CHECKING:
    from flowgrain.config.schema import Config

TAIL_CACHE = r"^(none|first_block:0?\.\d+|taylorseer:[2-9])$"
"""Pattern of a feature cache."""


def shortest_tail(cache: str) -> int:
    """The number of consecutive steps from which a feature cache skips work."""
    return 3 if cache.startswith("taylorseer") else 2


class ExploreConfig(Section):
    """Exploration: many cheap candidates per group, of which the best and the worst are sampled."""

    candidates: int = Setting(
        0,
        "Candidates of every comparison group. They are sampled cheaply and scored. The best and "
        "the worst are sampled exactly and trained, method.group_size in total. 0: no exploration.",
        unit="samples",
        ge=0,
        le=10_000,
    )
    num_steps: int = Setting(
        6,
        "ODE steps of a candidate from noise. A candidate that branches later takes a "
        "proportional share.",
        unit="steps",
        ge=1,
        le=1000,
    )
    tail_cache: str = Setting(
        "none",
        "Feature cache of the candidates: none, first_block:THRESHOLD or taylorseer:INTERVAL.",
        pattern=TAIL_CACHE,
    )
    tail_weights: Literal["same", "int8", "float8"] = Setting(
        "same", "Model weights of the candidates: the same, or a copy quantized by torchao."
    )


class AdaptiveGroupsConfig(Section):
    """Adaptive groups: prompts whose first samples have equal rewards are replaced."""

    probe: int = Setting(
        0,
        "Samples of every group that are scored first. A prompt without spread in these rewards is "
        "replaced. 0: no prompt is replaced.",
        unit="samples",
        ge=0,
        le=10_000,
    )
    min_spread: float = Setting(
        0.0,
        "A prompt is replaced if the standard deviation of the weighted rewards of its first "
        "samples is at most this value.",
        ge=0,
        le=1e6,
    )
    max_rounds: int = Setting(
        3,
        "Prompts that a place in the step may try after its first prompt. The last one is kept.",
        unit="prompts",
        ge=1,
        le=MAX_STEPS,
    )


def check_economy(config: "Config") -> None:
    """Check exploration and adaptive groups against the method.

    Raises:
        ValueError: a setting has no effect, or is not possible with the method.
    """
    explore, adaptive = config.sampling.explore, config.training.adaptive_groups
    for section, values, first in (
        ("sampling.explore", explore, "candidates"),
        ("training.adaptive_groups", adaptive, "probe"),
    ):
        if getattr(values, first):
            _check_method(config, f"{section}.{first}={getattr(values, first)}")
            continue
        for name, field in type(values).model_fields.items():
            if getattr(values, name) != field.default:
                raise ValueError(
                    f"{section}.{name}={getattr(values, name)}: has no effect with "
                    f"{section}.{first}=0. Remove it, or set {section}.{first}."
                )
    if explore.candidates and adaptive.probe:
        raise ValueError(
            f"training.adaptive_groups.probe={adaptive.probe}: not possible together with "
            f"sampling.explore.candidates={explore.candidates}. Remove one of the two settings."
        )
    if explore.candidates:
        _check_explore(config)
    if adaptive.probe:
        _check_adaptive(config)


def _check_method(config: "Config", setting: str) -> None:
    method = config.method
    if config.data.kind is not None:
        raise ValueError(
            f"{setting}: with data.{config.data.kind}, no images are sampled. Remove it."
        )
    if method.not_compared:
        raise ValueError(
            f"{setting}: not possible with method {method.name!r}, because {method.not_compared}. "
            "Remove it."
        )


def _check_explore(config: "Config") -> None:
    explore, method, tree = config.sampling.explore, config.method, config.tree()
    setting = f"sampling.explore.candidates={explore.candidates}"
    try:
        groups = choice_groups(tree)
    except ValueError as error:
        raise ValueError(
            f"{setting}: not possible with method {method.name!r}, because {error}. Remove it."
        ) from error
    largest = max(map(len, groups))
    if explore.candidates <= largest:
        raise ValueError(
            f"{setting}: a group of the method has {largest} samples already. "
            f"Use more than {largest}, for example {4 * largest}."
        )
    if explore.candidates * len(groups) * (explore.num_steps + 1) > MAX_ROWS:
        raise ValueError(
            f"{setting}: {len(groups)} groups with sampling.explore.num_steps={explore.num_steps} "
            f"have more than {MAX_ROWS:,} rows per prompt. Use a smaller value."
        )
    steps = config.sampling.num_steps
    if explore.num_steps > steps:
        raise ValueError(
            f"sampling.explore.num_steps={explore.num_steps}: more than "
            f"sampling.num_steps={steps}. Use at most {steps}."
        )
    for name, exact in (("tail_cache", "none"), ("tail_weights", "same")):
        value = getattr(explore, name)
        if value != exact and isinstance(method, ForwardProcess) and method.old_samples:
            raise ValueError(
                f"sampling.explore.{name}={value}: method {method.name!r} samples with its slowly "
                f"moving policy, of which there is no approximate copy. Use {exact}."
            )
        if name == "tail_cache" and value != exact and config.runtime.compile:
            raise ValueError(
                f"sampling.explore.{name}={value}: changes the blocks that "
                f"runtime.compile={config.runtime.compile} compiles. Remove one of the two."
            )
    if explore.tail_cache != "none":
        _check_cheap_tail(explore, candidates_of(tree, largest, explore.num_steps).tree)


def _check_cheap_tail(explore: ExploreConfig, tree: Tree) -> None:
    """Check that the completions in `tree`, of candidates, are long enough for their cache.

    Raises:
        ValueError: they are not.
    """
    cache, length = explore.tail_cache, tail_length(tree)
    if length < shortest_tail(cache):
        raise ValueError(
            f"sampling.explore.tail_cache={cache}: has no effect on candidates that are completed "
            f"in {length} {'step' if length == 1 else 'steps'}. Remove it, or use a larger "
            f"value than sampling.explore.num_steps={explore.num_steps}."
        )


def _check_adaptive(config: "Config") -> None:
    adaptive, method, tree = config.training.adaptive_groups, config.method, config.tree()
    setting = f"training.adaptive_groups.probe={adaptive.probe}"
    roots = int((tree.parent == ROOT).sum())
    if config.training.graph_memory:
        raise ValueError(
            f"{setting}: not possible together with training.graph_memory="
            f"{config.training.graph_memory}, because a group is sampled in parts. Remove one of "
            "the two settings."
        )
    if branch_groups(tree) or roots < 2:
        raise ValueError(
            f"{setting}: not possible with method {method.name!r} and these options, because the "
            "samples of a prompt do not start from independent noise. Remove it."
        )
    if not 2 <= adaptive.probe < roots:
        raise ValueError(
            f"{setting}: a group has {roots} samples. Use 2 to {roots - 1}."
            if roots > 2
            else f"{setting}: a group of {roots} samples cannot be divided. Remove it."
        )
