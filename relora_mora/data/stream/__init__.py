"""The training stream: lanes of token blocks, made by worker processes."""
