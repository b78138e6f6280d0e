"""Sweeps: one run for each point of a grid of settings, what these share, and a table of their results."""
