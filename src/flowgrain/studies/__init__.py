"""Comparisons of several methods on one model at equal budget."""
