"""The mathematics: transition kernels, rollout trees, their executor, credit and objectives. Tensors only."""
