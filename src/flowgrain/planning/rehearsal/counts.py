"""What a rehearsal counts, as numbers by kind and name."""

from collections.abc import Mapping

Counts = Mapping[tuple[str, str], float]
"""Numbers by kind ("flops", "moved", "copied", "syncs", "rows") and name."""


def difference(later: Counts, earlier: Counts) -> Counts:
    """What was counted between two moments. Numbers that did not change are left out."""
    changes = {key: value - earlier.get(key, 0.0) for key, value in later.items()}
    return {key: value for key, value in changes.items() if value}


def of_phase(counts: Counts, old: str, new: str) -> Counts:
    """Counts of phase `old` as those of phase `new`. The names of traffic begin with the phase."""
    return {
        (kind, f"{new}: {name.removeprefix(f'{old}: ')}" if kind == "moved" else name): value
        for (kind, name), value in counts.items()
    }


def plus(one: Counts, other: Counts) -> Counts:
    """The sum of two counts."""
    return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in {**one, **other}}


def times(counts: Counts, number: int) -> Counts:
    """A multiple of counts."""
    return {key: number * value for key, value in counts.items()}
