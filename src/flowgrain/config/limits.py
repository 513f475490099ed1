"""Limits of settings, so that a typing error is refused before it fills the memory."""

MAX_STEPS = 10_000_000
"""Limit of settings that count training steps or updates."""
MAX_PROMPTS = 1_000_000
"""Limit of settings that count prompts or their images. `training.fit` checks the memory."""
MAX_ROWS = 100_000
"""Limit of settings that count rows of a batch."""
