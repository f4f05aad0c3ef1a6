"""One step on a cluster: what its ranks send, and how long it takes. Formulas from shapes; nothing is sent.

They follow the sources of DeepSpeed 0.19, and a test counts the bytes of two-rank steps. Merges, which are rare, and
latencies are not counted. docs/clusters.md has the bytes of each stage in a table.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from relora_mora.config.checks.deepspeed import zero_defaults
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.memory import weight_bytes
from relora_mora.sizing.setup import MAX_REUSE_DISTANCE, Setup
from relora_mora.sizing.work import exchanged_bytes, passes_bytes, product_flops
from relora_mora.system.devices import CPU, Device

BACKWARD_SHARE = 2 / 3  # of compute
_WIDTHS = {"fp32": 4, "bf16": 2}


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
        """Seconds for ``size`` bytes that each device of a ring sends; 0 if no bandwidth is known.

        The slowest part of the ring decides: between devices of a host, or between hosts, of which each sends as many
        bytes as a device.
        """
        rates = [self.device.peer_gbytes_per_s * 1e9] if self.devices_per_node > 1 else []
        rates += [self.node_gbits * 1e9 / 8] if self.nodes > 1 else []
        return max([0.0, *(size / rate for rate in rates if rate)])


@dataclass(frozen=True)
class Step:
    """Bytes that a rank passes to collectives in a step, bytes that it ``sent`` in a ring for them, and seconds.

    ``all_reduced``: gradients whose sum every rank gets. ``reduced``: gradients whose sum only its owner gets.
    ``gathered``: weights that training waits for, after the step or, at stage 3, in forward and backward.
    ``exchanged``: the pieces of matrices that an optimizer needs whole, to their owners and back.
    ``hidden``: the seconds of ``network`` in which devices compute.
    """

    all_reduced: float
    reduced: float
    gathered: float
    exchanged: float
    sent: float
    compute: float
    optimizer: float
    network: float
    hidden: float

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.network - self.hidden


def step_of(model: PreTrainedModel, setup: Setup, cluster: Cluster, flops_per_token: float, rate: float) -> Step:
    """A step without evaluations and checkpoints; ``rate``: FLOP/s of a device while it computes.

    The model may be on the meta device. In a ring of N ranks a device sends 2 (N - 1) / N of the all-reduced bytes, and
    (N - 1) / N of the others.
    """
    stage, ranks = setup.stage, setup.world_size
    trained = count_parameters(model).trainable
    in_transit = _WIDTHS.get(str(setup.config.train.deepspeed.get("communication_data_type")), setup.width)
    gradients = in_transit * trained * (setup.micro_batches if stage >= 2 else 1)
    gathered = _gathered_at_stage_3(model, setup) if stage == 3 else setup.width * trained if stage else 0
    exchanged = exchanged_bytes(model, setup)
    in_ring = (ranks - 1) / ranks
    sent_gradients = in_ring * gradients * (1 if stage == 3 else 2)
    sent = sent_gradients + in_ring * (gathered + exchanged)

    compute = flops_per_token * setup.config.tokens_per_step / (ranks * rate)
    # element-wise passes at the memory's bandwidth, and products at the rate of the arithmetic
    passes = passes_bytes(model, setup.config.optim) + trained * setup.width
    bandwidth = cluster.device.memory_gbytes_per_s * 1e9
    optimizer = product_flops(model, setup.config.optim) / rate + (passes / bandwidth if bandwidth else 0.0)
    hidden = 0.0
    defaults = zero_defaults(stage, ranks, trained, on_gpu=setup.on_gpu)
    if stage == 3 and setup.zero("overlap_comm", True):
        hidden = min(cluster.seconds_to_send(sent_gradients + in_ring * gathered), compute)
    if stage == 2 and setup.zero("overlap_comm", defaults.get("overlap_comm", False)):
        hidden = min(cluster.seconds_to_send(sent_gradients), BACKWARD_SHARE * compute)
    return Step(
        all_reduced=0 if stage == 3 else gradients,
        reduced=gradients if stage == 3 else 0,
        gathered=gathered,
        exchanged=exchanged,
        sent=sent,
        compute=compute,
        optimizer=optimizer / setup.sharers,
        network=cluster.seconds_to_send(sent),
        hidden=hidden,
    )


def _gathered_at_stage_3(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of weights: all in every forward, and in backward those again that are not used again soon.

    Small parameters are gathered once a step.
    """
    every = sum(parameter.numel() for parameter in model.parameters())
    persistent = setup.persistent(model)
    again = max(0, every - setup.zero("stage3_max_reuse_distance", MAX_REUSE_DISTANCE) / 2)
    of_micro_batch = weight_bytes(model, setup) / every * (every - persistent + again)
    return setup.micro_batches * of_micro_batch + setup.width * persistent
