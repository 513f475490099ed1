"""Parts of a rehearsal: the ledger, lines through depths, and the search for rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowgrain.models.published import PUBLISHED
from flowgrain.planning.rehearsal.depth import combine, depths
from flowgrain.planning.rehearsal.ledger import Ledger, Peak
from flowgrain.planning.rehearsal.step import Measurement
from flowgrain.planning.search import _most

FLUX = PUBLISHED["black-forest-labs/FLUX.1-dev"]["transformer"]
SD3 = PUBLISHED["stabilityai/stable-diffusion-3.5-medium"]["transformer"]


def test_the_peak_and_its_kinds():
    ledger = Ledger()
    kept = torch.empty(1000, dtype=torch.uint8)
    with ledger.during("first"):
        ledger.add(kept)
        ledger.add(kept[10:20])  # the same storage
        temporary = torch.empty(3000, dtype=torch.uint8)
        ledger.add(temporary)
        del temporary
    with ledger.during("second"):
        other = torch.empty(100, dtype=torch.uint8)
        ledger.add(other)
    ledger.tag("weights", [kept, None])
    peaks = ledger.peaks()
    assert peaks["first"].kinds == {"weights": 1024.0, "activations": 3072.0}
    assert peaks["second"].kinds == {"weights": 1024.0, "activations": 512.0}


def test_a_storage_that_is_freed_and_allocated_again():
    ledger = Ledger()
    tensor = torch.empty(1000, dtype=torch.uint8)
    ledger.add(tensor)
    tensor.untyped_storage().resize_(0)
    ledger.resized(tensor.untyped_storage())
    with ledger.during("empty"):
        small = torch.empty(1, dtype=torch.uint8)
        ledger.add(small)
    assert ledger.peaks()["empty"].total == 512


def test_a_repeated_call_has_the_peak_of_the_first():
    ledger = Ledger()
    start = ledger.position
    with ledger.during("call"):
        parts = [torch.empty(600, dtype=torch.uint8) for _ in range(3)]
        for part in parts:
            ledger.add(part)
        del part
        parts.pop()
        parts.clear()
    held = ledger.highest(start)
    assert sum(size for _, size in held) == 3 * 1024
    base = torch.empty(512, dtype=torch.uint8)
    ledger.add(base)
    with ledger.during("repeated"):
        ledger.repeat(held)
    assert ledger.peaks()["repeated"].total == 512 + 3 * 1024


def measurement(blocks, coefficients):
    """A measurement that grows linearly with the blocks."""
    value = float(np.dot([1, *blocks], coefficients))
    return Measurement(
        peaks={"update": Peak({"weights": value})},
        flops={"update": 2 * value},
        moved={"all-gather": 3 * value},
        copied={},
        syncs={"here": 1},
        checkpoint=value,
        counts={"gradient": 5},
    )


def blocks_of(config):
    if "dual_attention_layers" in config:
        dual = len(config["dual_attention_layers"])
        return dual, config["num_layers"] - dual
    return config.get("num_layers", 19), config.get("num_single_layers", 38)


@pytest.mark.parametrize("config", [FLUX, SD3])
@given(coefficients=st.tuples(*[st.integers(1, 10**6)] * 3))
def test_lines_through_shallow_models_are_exact(config, coefficients):
    chosen = depths(config)
    measured = [measurement(blocks_of(shape), coefficients) for shape in chosen.configs]
    found = combine(measured, chosen.factors)
    full = measurement(blocks_of(config), coefficients)
    assert found.peaks["update"].total == pytest.approx(full.peaks["update"].total, rel=1e-9)
    assert found.flops == pytest.approx(full.flops, rel=1e-9)
    assert found.moved == pytest.approx(full.moved, rel=1e-9)
    assert found.checkpoint == pytest.approx(full.checkpoint, rel=1e-9)


def test_depths_of_models():
    assert len(depths(FLUX).configs) == 3
    assert len(depths(FLUX, "shallow").configs) == 1
    assert depths(FLUX, "full").configs == [FLUX]
    small = {**FLUX, "num_layers": 2, "num_single_layers": 3}
    assert depths(small).configs == [small]
    unknown = {"_class_name": "SomethingElse", "num_layers": 50}
    assert depths(unknown).configs == [unknown]


class Found:
    def __init__(self, total):
        self.phases = {"sample": Peak({"activations": total})}


@given(st.integers(0, 1000), st.integers(1, 100), st.integers(0, 5000))
def test_the_most_rows_that_fit(base, each, free):
    usable = base + each + free  # one row fits
    rows = _most(Found(base + each), Found(base + 2 * each), ("sample",), usable)
    assert 1 <= rows <= 64
    assert base + rows * each <= usable
    if rows < 64:
        assert base + (rows + 1) * each > usable
