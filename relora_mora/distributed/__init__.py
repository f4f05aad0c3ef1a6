"""The ranks of a run: joining them, and collectives through host memory. Uses torch alone, without DeepSpeed."""

from relora_mora.distributed.collectives import (
    RanksError,
    control_group,
    from_first_rank,
    gather_from_ranks,
    is_device_failure,
    is_peer_failure,
    least_over_hosts,
    leave_together,
    on_all_ranks,
    same_on_all_ranks,
    sum_over_hosts,
)
from relora_mora.distributed.device import backend_name, device_of_rank
from relora_mora.distributed.join import JoinError, join, store_address

__all__ = [
    "JoinError",
    "RanksError",
    "backend_name",
    "control_group",
    "device_of_rank",
    "from_first_rank",
    "gather_from_ranks",
    "is_device_failure",
    "is_peer_failure",
    "join",
    "least_over_hosts",
    "leave_together",
    "on_all_ranks",
    "same_on_all_ranks",
    "store_address",
    "sum_over_hosts",
]
