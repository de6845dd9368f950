"""Weights of other libraries: one table of names and shapes for each format, read in both directions."""
