"""Answers before a run starts: its cost, memory and speed, and whether its parts work. Nothing here trains."""
