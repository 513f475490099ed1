"""`python -m flowgrain` is the command `flowgrain`."""

from flowgrain.cli import main

main()
