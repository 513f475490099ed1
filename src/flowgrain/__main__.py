"""`python -m flowgrain` is the command `flowgrain`."""

from flowgrain.cli.main import main

main()
