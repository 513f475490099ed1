"""Settings of rollouts in separate worker processes, and when they can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowgrain.methods import PolicyGradient
from flowgrain.settings import Section, Setting

if TYPE_CHECKING:
    from flowgrain.config.schema import Config


class RolloutConfig(Section):
    """Worker processes that sample and score the rollouts. They run on Ray (`flowgrain[ray]`)."""

    workers: int = Setting(
        0,
        "Processes that sample, decode and score, besides the process that trains. 0: the training "
        "process samples.",
        unit="processes",
        ge=0,
        le=1024,
    )
    max_staleness: int = Setting(
        0,
        "Training steps by which the parameters that sample may be older. 0: the workers sample "
        "with the latest parameters, and training waits for them. 1: the workers sample the next "
        "step during the update.",
        unit="steps",
        keep=True,
        ge=0,
        le=1,
    )
    address: str | None = Setting(
        None,
        "Address of a running Ray cluster, such as HOST:6379, or auto. Default: start the workers "
        "on this machine.",
        min_length=1,
    )


def check_rollout(config: Config) -> None:
    """Check that every setting of the section has an effect, and that every worker gets prompts.

    Raises:
        ValueError: a setting cannot be used.
    """
    rollout, method = config.rollout, config.method
    if not rollout.workers:
        for name in ("max_staleness", "address"):
            value = getattr(rollout, name)
            if value:
                default = RolloutConfig.model_fields[name].default
                raise ValueError(
                    f"rollout.{name}={value}: has no effect without workers. Set rollout.workers, "
                    f"or use rollout.{name}={'null' if default is None else default}."
                )
        return
    if config.data.kind is not None:
        raise ValueError(
            f"rollout.workers={rollout.workers}: has no effect with data.{config.data.kind}, "
            "because given images are not sampled. Use rollout.workers=0."
        )
    for name, value in (
        ("sampling.explore.candidates", config.sampling.explore.candidates),
        ("training.adaptive_groups.probe", config.training.adaptive_groups.probe),
        ("training.graph_memory", config.training.graph_memory),
    ):
        if value:
            raise ValueError(
                f"rollout.workers={rollout.workers}: not possible together with {name}={value}, "
                "which the training process samples itself. Remove one of the two settings."
            )
    degree = config.runtime.context_parallel
    if degree > 1:
        raise ValueError(
            f"rollout.workers={rollout.workers}: not possible together with "
            f"runtime.context_parallel={degree}, which needs several training processes. Remove "
            "one of the two settings."
        )
    if rollout.max_staleness and not isinstance(method, PolicyGradient):
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness}: method {method.name!r} has no "
            "importance ratio that corrects for the older parameters. Use rollout.max_staleness=0, "
            "or a policy-gradient method such as g2rpo."
        )
    prompts, size = config.training.prompts_per_step, config.sampling.prompts_per_chunk
    chunks = 1 if size is None else -(-prompts // size)
    if chunks < rollout.workers:
        fix = f"Use rollout.workers={chunks}"
        if prompts >= rollout.workers:
            fix += f", or sampling.prompts_per_chunk={prompts // rollout.workers}"
        raise ValueError(
            f"rollout.workers={rollout.workers}: a worker samples whole chunks, and the "
            f"{prompts} prompts of a step are {chunks} "
            f"{'chunk' if chunks == 1 else 'chunks'} with sampling.prompts_per_chunk="
            f"{'null' if size is None else size}. {fix}."
        )


def without_workers(config: Config) -> Config:
    """`config` for work that only uses the policy of this process, with an empty section."""
    return config.model_copy(update={"rollout": RolloutConfig()})
