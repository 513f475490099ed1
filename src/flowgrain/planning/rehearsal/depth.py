"""Models with fewer blocks, and lines through their measurements.

The blocks of a kind are identical, so that memory, FLOPs and traffic grow by the same amount with
each of them.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import diffusers

from flowgrain.planning.rehearsal.ledger import Peak
from flowgrain.planning.rehearsal.step import Measurement

SHALLOW, MORE = 3, 2
"""Blocks of each kind in the smallest model, and blocks that are added. In a backward pass, FSDP2
gathers the parameters of the next block and still holds the gradients of the last one, so that a
block needs a neighbor of its kind on both sides.
"""

_COUNTS: Mapping[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": ("num_layers", "num_single_layers"),
    "Flux2Transformer2DModel": ("num_layers", "num_single_layers"),
    "QwenImageTransformer2DModel": ("num_layers",),
    "SD3Transformer2DModel": ("num_layers",),
    "ZImageTransformer2DModel": ("n_layers",),
}
"""Numbers of blocks in the configuration of a transformer, by its class."""

Configuration = Mapping[str, Any]


@dataclass(frozen=True)
class Depths:
    """Transformers with fewer blocks, whose measurements determine that of the full transformer.

    Attributes:
        configs: configurations of the transformers.
        factors: the measurement of the full transformer is the sum of these multiples of the
            measurements.
    """

    configs: list[Configuration]
    factors: list[float]


Depth = Literal["lines", "full", "shallow"]
"""lines: smaller transformers, and lines through their measurements. full: all blocks. shallow: a
small transformer alone, which finds errors, but no sizes.
"""


def depths(config: Configuration, depth: Depth = "lines") -> Depths:
    """The transformers to measure in place of the one with configuration `config`.

    Args:
        config: configuration of the full transformer.
        depth: see `Depth`.
    """
    counts = {} if depth == "full" else _blocks(config)
    longer = {kind: count for kind, count in counts.items() if count > SHALLOW + MORE}
    base = {kind: SHALLOW if kind in longer else count for kind, count in counts.items()}
    if not longer:
        return Depths([config], [1.0])
    if depth == "shallow":
        return Depths([_with_blocks(config, base)], [1.0])
    slopes = {kind: (count - SHALLOW) / MORE for kind, count in longer.items()}
    configs = [_with_blocks(config, base)]
    configs += [_with_blocks(config, base | {kind: base[kind] + MORE}) for kind in longer]
    return Depths(configs, [1.0 - sum(slopes.values()), *slopes.values()])


def combine(measured: Sequence[Measurement], factors: Sequence[float]) -> Measurement:
    """The sum of multiples of measurements."""
    peaks = {
        phase: Peak(_sum([m.peaks[phase].kinds for m in measured], factors))
        for phase in measured[0].peaks
        if all(phase in m.peaks for m in measured)
    }
    syncs = _sum([m.syncs for m in measured], factors)
    return Measurement(
        peaks=peaks,
        flops=_sum([m.flops for m in measured], factors),
        moved=_sum([m.moved for m in measured], factors),
        copied=_sum([m.copied for m in measured], factors),
        syncs={place: round(count) for place, count in syncs.items()},
        checkpoint=sum(m.checkpoint * f for m, f in zip(measured, factors, strict=True)),
        counts=measured[0].counts,
        largest=measured[0].largest,
    )


def _sum(parts: Sequence[Mapping[str, float]], factors: Sequence[float]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    sums = {
        name: sum(part.get(name, 0.0) * f for part, f in zip(parts, factors, strict=True))
        for name in names
    }
    return {name: max(value, 0.0) for name, value in sums.items()}


def _blocks(config: Configuration) -> dict[str, int]:
    """Numbers of blocks by kind. SD3.5-medium has two kinds in one list."""
    name = str(config["_class_name"])
    counts = {key: _value(config, key) for key in _COUNTS.get(name, ())}
    dual = len(config.get("dual_attention_layers", ()))
    if dual:
        counts = {"dual": dual, "plain": counts["num_layers"] - dual}
    return counts


def _value(config: Configuration, key: str) -> int:
    parameters = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters
    return int(config.get(key, parameters[key].default))


def _with_blocks(config: Configuration, counts: Mapping[str, int]) -> Configuration:
    if "dual" not in counts:
        return {**config, **counts}
    dual = counts["dual"]
    return {
        **config,
        "num_layers": dual + counts["plain"],
        "dual_attention_layers": tuple(range(dual)),
    }
