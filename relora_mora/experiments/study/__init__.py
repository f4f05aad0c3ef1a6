"""Grids of runs: what is run, the runs in turn, and what is kept of them."""
