"""Combinations of settings that cannot work, each with its remedy."""
