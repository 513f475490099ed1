"""What a rehearsal counts, as numbers by kind and name."""

from collections.abc import Mapping

Counts = Mapping[tuple[str, str], float]
"""Numbers by kind ("flops", "moved", "copied", "syncs", "rows") and name."""


def difference(later: Counts, earlier: Counts) -> Counts:
    """What was counted between two moments."""
    return {key: value - earlier.get(key, 0.0) for key, value in later.items()}


def plus(one: Counts, other: Counts) -> Counts:
    """The sum of two counts."""
    return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in {**one, **other}}


def times(counts: Counts, number: int) -> Counts:
    """A multiple of counts."""
    return {key: number * value for key, value in counts.items()}
