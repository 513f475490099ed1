"""The command line."""

from flowgrain.cli.main import main

__all__ = ["main"]
