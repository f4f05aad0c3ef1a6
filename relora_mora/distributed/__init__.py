"""The ranks of a run: joining them, and collectives through host memory. Needs torch but not DeepSpeed."""
