"""The ranks of a run: joining them, and collectives through host memory. Uses torch alone, without DeepSpeed."""

from relora_mora.distributed.collectives import (
    from_first_rank,
    gather_from_ranks,
    is_device_failure,
    is_peer_failure,
    least_over_hosts,
    leave_together,
    let_ranks_wait,
    on_all_ranks,
    same_on_all_ranks,
    sum_over_hosts,
)
from relora_mora.distributed.join import join, joined_within, store_address

__all__ = [
    "from_first_rank",
    "gather_from_ranks",
    "is_device_failure",
    "is_peer_failure",
    "join",
    "joined_within",
    "least_over_hosts",
    "leave_together",
    "let_ranks_wait",
    "on_all_ranks",
    "same_on_all_ranks",
    "store_address",
    "sum_over_hosts",
]
