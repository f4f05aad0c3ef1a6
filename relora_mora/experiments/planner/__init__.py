"""The planner: what a run needs on a cluster in memory for each stage, network, tokens and time."""
