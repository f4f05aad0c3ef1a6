"""What a run needs, computed from shapes: memory, arithmetic, and whether it fits."""
