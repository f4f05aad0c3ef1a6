"""A model of one step on a cluster: what its ranks send, and how long it takes. Formulas from shapes; nothing is sent.

A step takes compute + optimizer + network - hidden:

compute    FLOPs of the arithmetic / (ranks x peak x utilization). The peak is that of bf16, also for products in 8 bits
optimizer  AdamW in float32 reads 16 and writes 12 bytes for each parameter that a rank owns, and writes the weight, at
           the device's memory bandwidth. If matrices have another optimizer: its passes and its products
           (``sizing/work.py``), with the products at the rate of the arithmetic
network    bytes that a device sends in a ring (below) / bandwidth. The slowest part of the ring decides: from
           device to device within a host, or from host to host, where a ring's bytes leave each host once. Latency is
           not counted
hidden     DeepSpeed sends while it computes at stage 3, and at stage 2 with ``overlap_comm``, the default on GPUs:
           compute can hide all traffic of stage 3; backward, two thirds of compute, can hide the gradients of stage 2.
           Otherwise DeepSpeed computes first, then sends

Symbols: T trainable and F frozen parameters, P = T + F, N ranks, b bytes of a gradient in transit (2 in bf16, 4 in
fp32, unless ``communication_data_type`` in ``train.deepspeed`` says otherwise), w bytes of a weight.

The formulas follow the sources of DeepSpeed 0.19, and a test counts two-rank steps:

=====  ================================================================================================================
stage  tensors passed to collectives in one step
=====  ================================================================================================================
0      all-reduce b T, once: gradients accumulate on each rank
1      all-reduce b T, once (in bf16 from float32 sums); all-gather w T after the step
2      all-reduce b T in every micro-batch; a rank keeps only its part. All-gather w T after the step
3      reduce-scatter b T in every micro-batch. All-gather w P in every forward, and at most P - D / 2 again in
       backward; D is ``stage3_max_reuse_distance``, and the last layers stay gathered because they are used again soon.
       Parameters of at most ``stage3_param_persistence_threshold`` elements are gathered once a step
=====  ================================================================================================================

Frozen weights have no gradient: below stage 3 a step moves only adapters, embeddings, norms and head. In a ring of N
ranks a device sends 2 (N - 1) / N of the all-reduced bytes and (N - 1) / N of the gathered or reduce-scattered bytes.
If the ring visits hosts in order, each host sends as many bytes to the next host as each device to its neighbor.
Merges, which are rare, are not counted.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from relora_mora.config.checks.deepspeed import zero_defaults
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.memory import weight_bytes
from relora_mora.sizing.setup import MAX_REUSE_DISTANCE, Setup
from relora_mora.sizing.work import exchanged_bytes, passes_bytes, product_flops
from relora_mora.system.devices import CPU, Device

BACKWARD_SHARE = 2 / 3
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
        """Seconds for ``size`` bytes that each device of a ring sends; 0 if no bandwidth is known."""
        rates = [self.device.peer_gbytes_per_s * 1e9] if self.devices_per_node > 1 else []
        rates += [self.node_gbits * 1e9 / 8] if self.nodes > 1 else []
        return max([0.0, *(size / rate for rate in rates if rate)])


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that one rank passes to collectives in a step.

    ``all_reduced``: gradients whose sum every rank gets. ``reduced``: gradients whose sum only its owner gets.
    ``gathered``: weights that training waits for, after the step or, at stage 3, in forward and backward.
    ``exchanged``: the pieces of matrices that an optimizer needs whole (``sizing/work.py``), to their owners and back.
    """

    ranks: int
    all_reduced: float
    reduced: float
    gathered: float
    exchanged: float

    @property
    def parts(self) -> tuple[float, float, float]:
        """Bytes that a rank sends in a ring: of gradients, weights and matrices."""
        gradients = 2 * self.all_reduced + self.reduced
        gradients, weights, matrices = (
            size * (self.ranks - 1) / self.ranks for size in (gradients, self.gathered, self.exchanged)
        )
        return gradients, weights, matrices

    @property
    def sent(self) -> float:
        return sum(self.parts)


def traffic(model: PreTrainedModel, setup: Setup) -> Traffic:
    """The traffic of one step; ``model`` may be on the meta device."""
    counts = count_parameters(model)
    ranks, width, micro_batches = setup.world_size, setup.width, setup.micro_batches
    in_transit = _WIDTHS.get(str(setup.config.train.deepspeed.get("communication_data_type")), width)
    gradients = counts.trainable * in_transit
    exchanged = exchanged_bytes(model, setup)
    if setup.stage < 3:
        times = micro_batches if setup.stage == 2 else 1
        return Traffic(ranks, times * gradients, 0, width * counts.trainable if setup.stage else 0, exchanged)
    every = counts.trainable + counts.frozen
    persistent = setup.persistent(model)
    again = max(0, every - setup.zero("stage3_max_reuse_distance", MAX_REUSE_DISTANCE) / 2)
    of_micro_batch = weight_bytes(model, setup) / every * micro_batches * (every - persistent + again)
    return Traffic(ranks, 0, micro_batches * gradients, of_micro_batch + width * persistent, exchanged)


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


def step_time(
    model: PreTrainedModel, setup: Setup, cluster: Cluster, sent: Traffic, flops_per_token: float, rate: float
) -> StepTime:
    """The time without evaluations, checkpoints and merges; ``rate``: FLOP/s of a device while it computes."""
    trained = count_parameters(model).trainable
    compute = flops_per_token * setup.config.tokens_per_step / (cluster.world_size * rate)
    gradients, weights, matrices = map(cluster.seconds_to_send, sent.parts)
    defaults = zero_defaults(setup.stage, setup.world_size, trained, on_gpu=setup.on_gpu)
    hidden = 0.0
    if setup.stage > 1 and setup.zero("overlap_comm", defaults.get("overlap_comm", setup.stage == 3)):
        hidden = min(gradients + weights, compute) if setup.stage == 3 else min(gradients, BACKWARD_SHARE * compute)
    passes = passes_bytes(model, setup.config.optim) + trained * setup.width
    bandwidth = cluster.device.memory_gbytes_per_s * 1e9
    optimizer = product_flops(model, setup.config.optim) / rate + (passes / bandwidth if bandwidth else 0.0)
    return StepTime(compute, optimizer / setup.sharers, gradients + weights + matrices, hidden)
