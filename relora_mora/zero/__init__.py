"""Everything that touches DeepSpeed: its start, its settings, and a view into its engine's insides."""

from relora_mora.zero.start import init_distributed  # isort: skip - tells DeepSpeed the accelerator, before it is imported
from relora_mora.zero.engine import Shard, ZeroEngine

__all__ = ["Shard", "ZeroEngine", "init_distributed"]
