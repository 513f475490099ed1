"""Rehearsals against the memory of real training steps on the CPU, by phase and kind."""

import pytest
import torch
from real_memory import OTHER, measured_step
from rehearsal import CASES, compare, difference, totals

from flowgrain.planning.rehearse import Rehearser

TOLERANCE = 0.05
ROUNDING = 0.1e6
"""Bytes that do not count: small tensors on the host, which a GPU does not have."""
HELD = {"weights", "gradients", "optimizer", "EMA", "reference", "old policy", "sampling copy"}


@pytest.fixture(scope="module")
def process():
    with Rehearser() as found:
        yield found


def check(found, expected_kinds):
    assert found["unknown"] == 0  # every named tensor was seen by the allocator
    assert {"sample", "decode", "first micro-batch", "later micro-batches", "optimizer"} <= set(
        found["phases"]
    )
    kinds = {kind for of_phase in found["phases"].values() for kind in of_phase}
    assert expected_kinds | {"latents", "VAE", OTHER} <= kinds
    for phase, of_phase in found["phases"].items():
        for kind, pair in {**of_phase, "total": totals(of_phase)}.items():
            close = abs(pair[0] - pair[1]) <= ROUNDING
            assert close or abs(difference(pair)) <= TOLERANCE, (phase, kind, pair)


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("flow_grpo LoRA, CFG, KL, EMA", {"weights", "gradients", "optimizer", "EMA"}),
        ("g2rpo full, KL, EMA", HELD - {"old policy", "sampling copy"}),
        ("diffusionnft full", HELD - {"EMA", "sampling copy"}),
    ],
)
def test_the_bundled_model(process, case, kinds):
    check(compare(CASES[case], process), kinds)


@pytest.mark.slow
def test_blocks_of_full_width(process):
    found = compare(CASES["SD3.5 2 blocks LoRA, checkpointing, micro-batch 2"], process)
    check(found, {"weights", "gradients", "optimizer", "text encoders"})


def test_an_allocation_that_a_rehearsal_does_not_have_is_seen(monkeypatch):
    """The instrument counts buffers that nothing names."""
    from rehearsal import COMMON, brightness, case_config, trainer_of

    config = case_config(CASES["flow_grpo LoRA, CFG, KL, EMA"], folder=None)
    del COMMON, brightness
    kept = []

    def leaking():
        trainer = trainer_of(config, None)
        kept.append(torch.ones(1_000_000))
        return trainer

    without = measured_step(lambda: trainer_of(config, None)).peaks
    found = measured_step(leaking).peaks
    for phase, kinds in found.items():
        extra = kinds[OTHER] - without[phase][OTHER]
        assert extra == pytest.approx(4e6, abs=2048), phase
