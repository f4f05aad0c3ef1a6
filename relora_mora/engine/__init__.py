"""The only room that touches DeepSpeed: its start, a view into its state, and the merge."""
