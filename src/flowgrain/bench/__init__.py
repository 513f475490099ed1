"""Measurements of a GPU: correctness and speed of the real architectures with random weights."""

STEP_NAMES = (
    *("machine", "numerics", "process-group", "resume", "compile", "tails"),
    *("sampling-sd3", "sampling-flux", "iteration-sd3", "iteration-flux"),
    *("training-sd3", "training-flux"),
)
"""The steps in order: checks first, then speed. `bench.steps.STEPS` has their functions."""
