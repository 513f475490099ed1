"""Rehearsals against the memory of real training steps on the CPU, by phase and kind."""

import pytest
import torch
from real_memory import OTHER, HostTensors, Marks, recorded, sweep
from rehearsal import difference, totals
from rehearsal_cases import CASES, compare

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


@pytest.mark.slow
def test_the_bundled_model(process):
    case = "g2rpo full, KL, EMA"
    check(compare(CASES[case], process), HELD - {"old policy", "sampling copy"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("flow_grpo LoRA, CFG, KL, EMA", {"weights", "gradients", "optimizer", "EMA"}),
        ("diffusionnft full", HELD - {"EMA", "sampling copy"}),
        ("densegrpo full", {"weights", "gradients", "optimizer"}),
        ("g2rpo full, 2 ranks, sharded", {"weights", "gradients", "unsharded parameters"}),
    ],
)
def test_other_methods_and_ranks(process, case, kinds):
    check(compare(CASES[case], process), kinds)


@pytest.mark.slow
def test_blocks_of_full_width(process):
    found = compare(CASES["SD3.5 2 blocks LoRA, checkpointing, micro-batch 2"], process)
    check(found, {"weights", "gradients", "optimizer", "text encoders"})


def test_the_instrument_counts_rounded_allocations():
    marks = Marks()
    with recorded() as profiler:
        marks.enter("sample")
        named, other = torch.ones(1000), torch.ones(2000)
        marks.tag({"weights": [named]})
        marks.enter("decode")
        del other
        buffer = torch.ones(600)
        marks.enter("end")
    found = sweep(profiler, marks)
    assert buffer.sum() == 600
    assert found.unknown == 0
    assert found.peaks["sample"] == {"weights": 4096, OTHER: 8192}
    assert found.peaks["decode"] == {"weights": 4096, OTHER: 2560}


def test_the_copies_of_a_gpu_are_made():
    """A tensor of the host is not memory of the device. Its copy is."""
    marks = Marks()
    with recorded() as profiler:
        marks.enter("sample")
        with HostTensors(marks):
            noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
            on_device = noise.to(torch.device("cpu"))
            on_host = (2 * on_device).cpu()
        marks.enter("end")
    assert on_device.data_ptr() != noise.data_ptr()
    assert hasattr(on_host, "on_host")
    assert not hasattr(on_device, "on_host")
    found = sweep(profiler, marks).peaks["sample"]
    assert found == pytest.approx({OTHER: 2 * 4096}, abs=1024)  # scalars are tensors, too
