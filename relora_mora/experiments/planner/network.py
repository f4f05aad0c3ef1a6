"""The bytes that the ranks send each other in one optimizer step, from shapes: formulas, nothing is sent.

Symbols: T trainable and F frozen parameters, P = T + F, N ranks, b bytes of a gradient in transit (2 in bf16, 4 in
fp32, unless ``communication_data_type`` in ``train.deepspeed`` says otherwise), w bytes of a weight.

The formulas follow the sources of DeepSpeed 0.19, and a test counts two-rank steps:

=====  ================================================================================================================
stage  tensors passed to collectives in one step
=====  ================================================================================================================
0      all-reduce b T, once: gradients accumulate on each rank
1      all-reduce b T, once (in bf16 from float32 sums); all-gather w T after the step
2      all-reduce b T in every micro-batch; a rank keeps only its part. All-gather w T after the step. With
       ``use_multi_rank_bucket_allreduce: false`` each part is reduced to its rank (also at stage 1 in fp32)
3      reduce-scatter b T in every micro-batch. All-gather w P in every forward, and at most P - D / 2 again in
       backward; D is ``stage3_max_reuse_distance``, and the last layers stay gathered because they are used again soon.
       Parameters of at most ``stage3_param_persistence_threshold`` elements are gathered once a step
=====  ================================================================================================================

Frozen weights have no gradient: below stage 3 a step moves only adapters, embeddings, norms and head. In a ring of N
ranks a device sends 2 (N - 1) / N of the all-reduced bytes and (N - 1) / N of the gathered, reduced or reduce-scattered
bytes. Gloo's reduce is not a ring and sends more than its all-reduce (docs/performance.md). If the ring visits hosts in
order, each host sends as many bytes to the next host as each of its devices to its neighbor.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from relora_mora.adapters.layers import adapter_layers
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.memory import stored_bytes, weight_bytes
from relora_mora.sizing.setup import MAX_REUSE_DISTANCE, Setup
from relora_mora.sizing.work import exchanged_bytes

_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that one rank passes to collectives in a step; ``merge`` and ``state`` are separate.

    ``all_reduced``: gradients whose sum every rank gets. ``reduced``: gradients whose sum only its owner gets.
    ``gathered``: weights that training waits for, after the step or, at stage 3, in forward and backward. ``merge``: a
    merge event, adapters to the owners of the base and new weights back. ``state``: the adapters' moments, which every
    rank gets whole in a merge if the reset keeps some of them. ``exchanged``: the pieces of matrices that an optimizer
    needs whole (``work.py``), to their owners and back.
    """

    ranks: int
    all_reduced: float
    reduced: float
    gathered: float
    merge: float
    state: float = 0.0
    exchanged: float = 0.0

    @property
    def given(self) -> float:
        return self.all_reduced + self.reduced + self.gathered + self.exchanged

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

    @property
    def sent_in_merge(self) -> float:
        return (self.merge + 2 * self.state) * (self.ranks - 1) / self.ranks


def traffic(model: PreTrainedModel, setup: Setup) -> Traffic:
    """The traffic of one step; ``model`` may be on the meta device."""
    config = setup.config
    stage = setup.stage
    ranks = setup.world_size
    width = setup.width
    counts = count_parameters(model)
    gradients = _WIDTHS.get(str(config.train.deepspeed.get("communication_data_type")), width) * counts.trainable
    merges = config.method.merges and ranks > 1
    merge = _merge_bytes(model, setup) if merges else 0
    state = 0.0
    if merges and stage and config.method.reset not in ("full", "none"):  # these resets do not need whole moments
        state = 4.0 * counts.adapters * len(config.optim.of_group("adapters").moments)
    exchanged = exchanged_bytes(model, setup)
    if stage < 3:
        gradients *= setup.micro_batches if stage == 2 else 1
        configurable = stage == 2 or (stage == 1 and not setup.bf16)  # BF16_Optimizer ignores this setting
        to_owners = configurable and not setup.zero("use_multi_rank_bucket_allreduce", True)
        everywhere, to_one = (0.0, gradients) if to_owners else (gradients, 0.0)
        after_step = width * counts.trainable if stage else 0
        return Traffic(ranks, everywhere, to_one, after_step, merge, state, exchanged)
    every = counts.trainable + counts.frozen
    persistent = sum(p.numel() for p in model.parameters() if p.numel() <= setup.persistence_threshold)
    again = max(0, every - setup.zero("stage3_max_reuse_distance", MAX_REUSE_DISTANCE) / 2)
    mean_width = weight_bytes(model, setup) / every
    gathered = mean_width * setup.micro_batches * (every - persistent + again) + width * persistent
    return Traffic(ranks, 0, gradients * setup.micro_batches, gathered, merge, state, exchanged)


def _merge_bytes(model: PreTrainedModel, setup: Setup) -> float:
    """Reduces adapters to the owners in float32, broadcasts weights (at stage 3 gathers them first), writes masters."""
    counts = count_parameters(model)
    weights = sum(stored_bytes(layer, setup) for _, layer in adapter_layers(model))
    if setup.stage == 0:
        return weights
    return 4 * counts.adapters + (2 * weights if setup.stage == 3 else weights + setup.width * counts.trainable)
