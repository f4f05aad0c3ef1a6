"""What a run needs: parameters, memory for each method and ZeRO stage, arithmetic, network, tokens and time."""

from relora_mora.plan.cluster import Cluster
from relora_mora.plan.plan import FRAGMENTATION, PROCESS_BYTES, STAGES, Plan, make_plan
from relora_mora.plan.render import duration, render
from relora_mora.system.devices import DEVICES, Device, named_device

__all__ = [
    "DEVICES",
    "FRAGMENTATION",
    "PROCESS_BYTES",
    "STAGES",
    "Cluster",
    "Device",
    "Plan",
    "duration",
    "make_plan",
    "named_device",
    "render",
]
