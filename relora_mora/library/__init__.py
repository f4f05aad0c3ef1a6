"""ReMoRA in a training loop of one's own; see docs/library.md."""
