"""Checkpoints: whole or absent, written in the background, readable on any world size and ZeRO stage."""

from relora_mora.checkpoint.layout import CheckpointError, Manifest, read_manifest
from relora_mora.checkpoint.places import list_checkpoints
from relora_mora.checkpoint.reader import CheckpointReader, newest_whole, verify
from relora_mora.checkpoint.tokenizer import damaged_tokenizer, tokenizer_of
from relora_mora.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "Manifest",
    "damaged_tokenizer",
    "list_checkpoints",
    "newest_whole",
    "read_manifest",
    "tokenizer_of",
    "verify",
]
