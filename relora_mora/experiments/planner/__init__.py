"""What a run needs on a cluster: memory for each stage, network, tokens and time."""
