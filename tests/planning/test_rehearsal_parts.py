"""Parts of a rehearsal: the ledger, lines through depths, and the search for rows."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowgrain.config import load_config
from flowgrain.models.published import PUBLISHED
from flowgrain.planning import search
from flowgrain.planning.gpus import GPUS
from flowgrain.planning.rehearsal.counts import difference, of_phase
from flowgrain.planning.rehearsal.depth import combine, depths
from flowgrain.planning.rehearsal.ledger import Ledger, Peak
from flowgrain.planning.rehearsal.step import LATER, Measurement
from flowgrain.planning.search import _most, _of_one_row

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
        largest={"update": 2},
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


def test_a_repeated_call_belongs_to_the_phase_that_repeats_it():
    earlier = {("moved", "encode: all_gather in a machine"): 7.0}
    counts = {("flops", ""): 3.0, ("moved", "sample: all_gather in a machine"): 5.0}
    assert difference({**earlier, **counts}, earlier) == counts
    assert of_phase(counts, "sample", "update") == {
        ("flops", ""): 3.0,
        ("moved", "update: all_gather in a machine"): 5.0,
    }


def test_depths_of_models():
    assert len(depths(FLUX).configs) == 3
    assert len(depths(FLUX, "shallow").configs) == 1
    assert depths(FLUX, "full").configs == [FLUX]
    small = {**FLUX, "num_layers": 2, "num_single_layers": 3}
    assert depths(small).configs == [small]
    unknown = {"_class_name": "SomethingElse", "num_layers": 50}
    assert depths(unknown).configs == [unknown]


class Found:
    """A rehearsal with the given bytes and rows of its phases."""

    def __init__(self, totals, rows, batches=None):
        self.phases = {name: Peak({"activations": total}) for name, total in totals.items()}
        self.measured = SimpleNamespace(largest=rows)
        self.peak = max(self.phases.items(), key=lambda item: item[1].total)
        self.batch_of_peak = (batches or {}).get(self.peak[0])

    def fits(self, memory):
        return self.peak[1].total <= 0.9 * memory


@given(st.integers(0, 1000), st.integers(0, 100), st.integers(0, 5000), st.integers(9, 64))
def test_the_most_rows_that_fit(base, each, free, all_rows):
    usable = base + each + free  # one row fits
    sizes = (8, min(16, all_rows))
    found = [Found({"sample": base + rows * each}, {"sample": rows}) for rows in sizes]
    rows = _most(found, ("sample",), usable)
    assert 1 <= rows <= 64
    assert base + rows * each <= usable
    if rows < 64:
        assert base + (rows + 1) * each > usable
    assert _of_one_row(found) == pytest.approx(base + each)


class Process:
    """Rehearsals with known lines. A call has at most `all_rows` rows.

    Decoding more than `wide` images needs 1,000 bytes more.
    """

    def __init__(self, wide, all_rows):
        self.wide, self.all_rows, self.count = wide, all_rows, 0

    def rehearse(self, config, gpus, gpu):
        self.count += 1
        settings = {
            "sample": ("sampling.batch_size", config.sampling.batch_size),
            LATER: ("training.micro_batch_size", config.training.micro_batch_size),
            "decode": ("sampling.decode_batch_size", config.sampling.decode_batch_size),
        }
        rows = {phase: min(value, self.all_rows) for phase, (_, value) in settings.items()}
        needs = {
            "sample": 100 + 5 * rows["sample"],
            "decode": 100 + 2 * rows["decode"] + 1000 * (rows["decode"] > self.wide),
            LATER: 200 + 10 * rows[LATER],
            "optimizer": 300,
        }
        return Found(needs, rows, settings)


@pytest.mark.parametrize(
    ("memory", "wide", "all_rows", "rows", "need", "rehearsals"),
    [
        (1000, 64, 64, (64, 64, 64), 840, 3),
        (500, 64, 64, (64, 25, 64), 450, 3),
        (500, 16, 64, (64, 25, 16), 450, 5),  # 64 and 32 images need more than their line says
        (300, 64, 64, (1, 1, 1), 300, 2),  # the optimizer does not fit
        (360, 64, 12, (44, 12, 64), 320, 3),  # 16 rows are not in the step
        (350, 64, 12, (43, 11, 64), 310, 3),
        (1000, 64, 6, (64, 64, 64), 300, 3),  # 8 rows are not in the step either, and 6 fit
        (280, 64, 6, (1, 1, 1), 300, 3),  # one row is rehearsed, but the optimizer does not fit
    ],
)
def test_the_largest_batches(monkeypatch, memory, wide, all_rows, rows, need, rehearsals):
    monkeypatch.setattr(search, "forecast", lambda *_: SimpleNamespace(total=2.0))
    process, gpu = Process(wide, all_rows), replace(GPUS["h100"], memory=memory)
    config = load_config("flow_grpo")
    found = search._largest(process, config, {"lora.rank": 4}, 1, gpu)
    names = ("sampling.batch_size", "training.micro_batch_size", "sampling.decode_batch_size")
    written = [f"{name}={count}" for name, count in zip(names, rows, strict=True)]
    assert found.settings == ["lora.rank=4", *written]
    assert found.memory == pytest.approx(need)
    assert process.count == rehearsals
    assert found.fits == (need <= 0.9 * memory)
    assert found.images_per_second == 24 * 24 / 2


def test_a_step_with_few_rows_fits_with_fewer(monkeypatch):
    """Six rows of an update do not fit. Without a rehearsal of one row, its need is not known."""
    monkeypatch.setattr(search, "forecast", lambda *_: SimpleNamespace(total=2.0))
    process = Process(64, 6)
    needs = process.rehearse

    def rehearse(config, gpus, gpu):
        found = needs(config, gpus, gpu)
        rows = found.measured.largest
        return Found({"optimizer": 300, LATER: 280 + 100 * rows[LATER]}, rows)

    process.rehearse = rehearse
    gpu = replace(GPUS["h100"], memory=800)
    found = search._largest(process, load_config("flow_grpo"), {}, 1, gpu)
    assert found.fits
    assert found.memory == 280 + 100 * 4
    assert "training.micro_batch_size=4" in found.settings
