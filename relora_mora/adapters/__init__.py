"""Adapter layers and their injection into a model."""
