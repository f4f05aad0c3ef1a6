"""Adapters alone: read, put onto a model, and written, in the layout of PEFT and of the released MoRA."""

from relora_mora.adapters.apply import load_model
from relora_mora.adapters.folder import AdapterFolder, is_adapter
from relora_mora.adapters.writer import write_adapter

__all__ = ["AdapterFolder", "is_adapter", "load_model", "write_adapter"]
