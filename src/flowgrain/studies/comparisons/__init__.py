"""Comparisons: one a file. Each is a module whose function `comparison()` returns the fields of compare.Comparison that it sets."""
