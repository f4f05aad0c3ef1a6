"""The training stream: lanes of token blocks, prepared by worker processes."""
