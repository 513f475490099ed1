"""The command line. Each file has one command or a small group."""

from flowgrain.cli.main import main

__all__ = ["main"]
