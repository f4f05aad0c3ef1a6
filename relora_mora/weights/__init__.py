"""Trained weights on disk: checkpoints as plain models, Hugging Face folders, adapters, exports."""
