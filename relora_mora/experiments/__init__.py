"""Tools around runs: studies, comparisons, the planner, spectra. Nothing else in the package imports them."""
