"""Everything that touches DeepSpeed: its start, its settings, and a view into its engine's insides."""

from relora_mora.zero.start import init_distributed  # isort: skip - sets the accelerator before DeepSpeed is imported
from relora_mora.zero.engine import ZeroEngine
from relora_mora.zero.masters import Fragment

__all__ = ["Fragment", "ZeroEngine", "init_distributed"]
