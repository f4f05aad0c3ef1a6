"""Pretrains LLaMA-style language models from scratch with ReMoRA, under DeepSpeed."""

__version__ = "0.1.0"
