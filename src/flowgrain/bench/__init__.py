"""Measurements of a GPU: correctness and speed of the real architectures with random weights."""
