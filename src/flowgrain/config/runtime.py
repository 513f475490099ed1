"""Checks of the section runtime against the other settings."""

from flowgrain.config.sections import RuntimeConfig, SamplingConfig
from flowgrain.methods import Method, Repair


def check_runtime(
    runtime: RuntimeConfig, sampling: SamplingConfig, method: Method, model: str
) -> None:
    """Check that compilation and context parallelism fit the other settings.

    Raises:
        ValueError: a combination is impossible. The message names it.
    """
    compile_, cache = runtime.compile, sampling.tail_cache
    if compile_ and model == "zimage":
        raise ValueError(
            f"runtime.compile={compile_}: prompts of model.name=zimage have different lengths, "
            "and every length would be compiled. Remove runtime.compile."
        )
    if compile_ and cache != "none":
        raise ValueError(
            f"runtime.compile={compile_}: sampling.tail_cache={cache} changes the compiled "
            "blocks. Remove one of the two settings."
        )
    degree = runtime.context_parallel
    if degree == 1:
        return
    for name, value, default in (
        ("runtime.compile", compile_, None),
        ("sampling.tail_cache", cache, "none"),
        ("sampling.tail_weights", sampling.tail_weights, "same"),
        ("sampling.explore.tail_cache", sampling.explore.tail_cache, "none"),
        ("sampling.explore.tail_weights", sampling.explore.tail_weights, "same"),
    ):
        if value != default:
            raise ValueError(
                f"runtime.context_parallel={degree}: cannot be combined with {name}={value}. Both "
                "change how the blocks are called. Remove one of the two settings."
            )
    if isinstance(method, Repair):
        raise ValueError(
            f"runtime.context_parallel={degree}: method {method.name!r} scores candidates during "
            "the update, and the ranks of a group could get different scores. Use "
            "runtime.context_parallel=1, or another method."
        )
