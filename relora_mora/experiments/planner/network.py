"""The bytes that the ranks send each other in one optimizer step, from shapes: formulas, nothing is sent.

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

from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.memory import weight_bytes
from relora_mora.sizing.setup import MAX_REUSE_DISTANCE, Setup
from relora_mora.sizing.work import exchanged_bytes

_WIDTHS = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that one rank passes to collectives in a step.

    ``all_reduced``: gradients whose sum every rank gets. ``reduced``: gradients whose sum only its owner gets.
    ``gathered``: weights that training waits for, after the step or, at stage 3, in forward and backward.
    ``exchanged``: the pieces of matrices that an optimizer needs whole (``work.py``), to their owners and back.
    """

    ranks: int
    all_reduced: float
    reduced: float
    gathered: float
    exchanged: float

    @property
    def sent_gradients(self) -> float:
        return (2 * self.all_reduced + self.reduced) * (self.ranks - 1) / self.ranks

    @property
    def sent_weights(self) -> float:
        return self.gathered * (self.ranks - 1) / self.ranks

    @property
    def sent_matrices(self) -> float:
        return self.exchanged * (self.ranks - 1) / self.ranks

    @property
    def sent(self) -> float:
        return self.sent_gradients + self.sent_weights + self.sent_matrices


def traffic(model: PreTrainedModel, setup: Setup) -> Traffic:
    """The traffic of one step; ``model`` may be on the meta device."""
    counts = count_parameters(model)
    ranks, width, micro_batches = setup.world_size, setup.width, setup.micro_batches
    gradients = counts.trainable * _WIDTHS.get(str(setup.config.train.deepspeed.get("communication_data_type")), width)
    exchanged = exchanged_bytes(model, setup)
    if setup.stage < 3:
        times = micro_batches if setup.stage == 2 else 1
        return Traffic(ranks, times * gradients, 0, width * counts.trainable if setup.stage else 0, exchanged)
    every = counts.trainable + counts.frozen
    persistent = sum(p.numel() for p in model.parameters() if p.numel() <= setup.persistence_threshold)
    again = max(0, every - setup.zero("stage3_max_reuse_distance", MAX_REUSE_DISTANCE) / 2)
    mean_width = weight_bytes(model, setup) / every
    gathered = mean_width * micro_batches * (every - persistent + again) + width * persistent
    return Traffic(ranks, 0, micro_batches * gradients, gathered, exchanged)
