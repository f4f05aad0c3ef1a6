"""Everything that touches DeepSpeed: its start, its settings, and a view into its engine's insides."""

from relora_mora.zero.start import init_distributed  # isort: skip - tells DeepSpeed the accelerator, before it is imported
from relora_mora.zero.engine import Fragment, ZeroEngine

__all__ = ["Fragment", "ZeroEngine", "init_distributed"]
