"""Checks of context parallelism: the number of processes, and the model.

See `distributed.context`.
"""

from typing import Any

from flowgrain.config.schema import Config
from flowgrain.distributed import env_rank
from flowgrain.models import Backbone
from flowgrain.settings import SettingsError

SUPPORTED = ("flux", "flux2", "qwen_image")
"""Names of the models whose transformers have a plan for context parallelism in diffusers."""


def check_ranks(degree: int) -> None:
    """Check that groups of `degree` ranks divide the processes of the run.

    Raises:
        SettingsError: they do not.
    """
    processes = env_rank()[1]
    if processes % degree == 0:
        return
    sizes = [n for n in range(1, processes + 1) if processes % n == 0]
    fix = f"Use {' or '.join(map(str, sizes))}"
    if processes < degree:
        fix = f"Start it with torchrun --nproc-per-node {degree}, or use runtime.context_parallel=1"
    found = "there is 1" if processes == 1 else f"there are {processes}"
    raise SettingsError(
        f"runtime.context_parallel={degree}: needs a multiple of {degree} processes, but {found}. "
        f"{fix}."
    )


def check_context(config: Config, backbone: Backbone) -> None:
    """Check that the model supports runtime.context_parallel.

    diffusers divides the image tokens, the text tokens and, in the attention, the heads.

    Raises:
        SettingsError: it does not. The message names the nearest values.
    """
    degree = config.runtime.context_parallel
    if degree == 1:
        return
    from flowgrain.models.pipeline import PipelineBackbone  # takes seconds to import

    setting, model = f"runtime.context_parallel={degree}", config.model
    transformer: Any = backbone.transformer
    if not isinstance(backbone, PipelineBackbone) or transformer._cp_plan is None:
        raise SettingsError(
            f"{setting}: diffusers has no plan that divides the tokens of "
            f"{type(transformer).__name__}. Use runtime.context_parallel=1, or model.name="
            f"{' or '.join(SUPPORTED)}."
        )
    heads = transformer.config.num_attention_heads
    if heads % degree:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - degree))[:2])
        raise SettingsError(
            f"{setting}: must divide the {heads} attention heads of {type(transformer).__name__}. "
            f"Use {' or '.join(map(str, nearest))}."
        )
    rows, columns = backbone.token_grid
    if rows * columns % degree:
        side = model.height // rows
        sizes = [n * side for n in nearest_rows(rows, columns, degree)]
        raise SettingsError(
            f"{setting}: must divide the {rows * columns} image tokens of model.height="
            f"{model.height} and model.width={model.width}. Use model.height="
            f"{' or '.join(map(str, sizes))}."
        )
    if model.max_prompt_tokens % degree:
        below = model.max_prompt_tokens // degree * degree
        sizes = [n for n in (below, below + degree) if n]
        raise SettingsError(
            f"{setting}: must divide model.max_prompt_tokens={model.max_prompt_tokens}. "
            f"Use {' or '.join(map(str, sizes))}."
        )
    _check_attention(setting, transformer)


def nearest_rows(rows: int, columns: int, degree: int) -> list[int]:
    """The numbers of rows next to `rows` with which `degree` divides all tokens."""
    below = next((n for n in range(rows, 0, -1) if n * columns % degree == 0), None)
    above = next(n for n in range(rows, rows + degree + 1) if n * columns % degree == 0)
    return [above] if below is None else sorted({below, above})


def _check_attention(setting: str, transformer: Any) -> None:
    """Check that the attention backend of `transformer` can divide the tokens.

    Raises:
        SettingsError: it cannot.
    """
    from diffusers.models import attention_dispatch  # takes seconds to import

    registry: Any = attention_dispatch._AttentionBackendRegistry
    processors = (getattr(module, "processor", None) for module in transformer.modules())
    chosen = (getattr(processor, "_attention_backend", None) for processor in processors)
    name = next((name for name in chosen if name is not None), None)
    backend = name or registry.get_active_backend()[0]
    backend = attention_dispatch.AttentionBackendName(backend)
    if not registry._is_context_parallel_available(backend):
        known = ", ".join(sorted(registry._supports_context_parallel))
        raise SettingsError(
            f"{setting}: the attention backend {backend.value} cannot divide the tokens. "
            f"Use one of {known} as model.attention_backend."
        )
