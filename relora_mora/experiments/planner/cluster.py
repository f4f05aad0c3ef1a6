"""A model of the time of one step on a cluster.

A step takes compute + optimizer + network - hidden:

compute    FLOPs of the arithmetic / (ranks x peak x utilization). The peak is that of bf16, also for products in 8 bits
optimizer  AdamW in float32 reads 16 and writes 12 bytes for each parameter that a rank owns, and writes the weight, at
           the device's memory bandwidth. If matrices have another optimizer: its passes and its products
           (``work.py``), with the products at the rate of the arithmetic
network    bytes that a device sends in a ring (``network.py``) / bandwidth. The slowest part of the ring decides: from
           device to device within a host, or from host to host, where a ring's bytes leave each host once. Latency is
           not counted
hidden     DeepSpeed sends while it computes at stage 3, and at stage 2 with ``overlap_comm``, the default on GPUs:
           compute can hide all traffic of stage 3; backward, two thirds of compute, can hide the gradients of stage 2.
           Otherwise DeepSpeed computes first, then sends
"""

from dataclasses import dataclass

from relora_mora.system.devices import CPU, Device


@dataclass(frozen=True)
class Cluster:
    """Hosts with equal devices. ``link_gbits``: the network of one host, all its cards together; None: the vendor's."""

    nodes: int
    devices_per_node: int
    device: Device
    link_gbits: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def on_cpu(self) -> bool:
        return self.device.name == CPU.name

    @property
    def node_gbits(self) -> float:
        return self.device.node_gbits * self.devices_per_node if self.link_gbits is None else self.link_gbits

    def seconds_to_send(self, size: float) -> float:
        """Seconds for ``size`` bytes that each device of a ring sends; 0 if no bandwidth is known."""
        rates = [self.device.peer_gbytes_per_s * 1e9] if self.devices_per_node > 1 else []
        rates += [self.node_gbits * 1e9 / 8] if self.nodes > 1 else []
        return max([0.0, *(size / rate for rate in rates if rate)])


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by part; ``hidden`` is the part of ``network`` that overlaps with compute."""

    compute: float
    optimizer: float
    network: float
    hidden: float

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.network - self.hidden
