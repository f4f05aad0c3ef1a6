"""Adapter layers, and how they are put into a model."""
