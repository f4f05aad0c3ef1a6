"""Readers for the rows of a shard, one for each format."""
