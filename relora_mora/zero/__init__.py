"""Everything that touches DeepSpeed: joining the processes, its settings, and a view into its engine's insides."""

from relora_mora.zero.processes import from_first_rank, init_distributed  # isort: skip - tells DeepSpeed the accelerator, before it is imported
from relora_mora.zero.engine import MOMENTS, Shard, ZeroEngine

__all__ = ["MOMENTS", "Shard", "ZeroEngine", "from_first_rank", "init_distributed"]
