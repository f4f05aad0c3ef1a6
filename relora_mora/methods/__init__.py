"""Adapter layers, and putting them into a model."""
