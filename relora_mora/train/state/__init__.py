"""The state of a run: what a checkpoint holds, and going back to one."""
