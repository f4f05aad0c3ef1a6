"""Everything that touches DeepSpeed: joining the processes, its settings, and a view into its engine's insides."""

from relora_mora.zero.processes import (  # isort: skip - tells DeepSpeed the accelerator, before it is imported
    JoinError,
    device_of_rank,
    from_first_rank,
    gather_from_ranks,
    init_distributed,
    lost_device,
    lost_peer,
    part_company,
    store_address,
    sum_over_hosts,
)
from relora_mora.zero.engine import MOMENTS, Shard, ZeroEngine

__all__ = [
    "MOMENTS",
    "JoinError",
    "Shard",
    "ZeroEngine",
    "device_of_rank",
    "from_first_rank",
    "gather_from_ranks",
    "init_distributed",
    "lost_device",
    "lost_peer",
    "part_company",
    "store_address",
    "sum_over_hosts",
]
