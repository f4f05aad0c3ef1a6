"""What a run needs: parameters, memory for each method and ZeRO stage, arithmetic, network, tokens and time."""

from relora_mora.plan.cluster import Cluster
from relora_mora.plan.plan import FRAGMENTATION, PROCESS_BYTES, STAGES, Plan, make_plan
from relora_mora.plan.render import duration, render

__all__ = [
    "FRAGMENTATION",
    "PROCESS_BYTES",
    "STAGES",
    "Cluster",
    "Plan",
    "duration",
    "make_plan",
    "render",
]
