"""Checkpoints: whole or absent, written in the background, readable on any world size and ZeRO stage."""
