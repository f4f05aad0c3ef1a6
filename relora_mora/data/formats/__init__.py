"""The rows of a shard in each format."""
