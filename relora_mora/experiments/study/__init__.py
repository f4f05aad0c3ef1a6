"""Studies: grids of runs, how they are run, and the records that are kept of them."""
