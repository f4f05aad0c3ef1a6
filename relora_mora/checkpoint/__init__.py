"""Checkpoints: complete or absent, written in the background, readable with any world size and ZeRO stage."""
