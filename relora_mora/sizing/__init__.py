"""What a run needs, computed from shapes: its memory, its arithmetic, and whether it fits."""
