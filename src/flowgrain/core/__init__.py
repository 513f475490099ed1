"""The mathematics: transition kernels, rollout trees, rollouts, credit and objectives."""
