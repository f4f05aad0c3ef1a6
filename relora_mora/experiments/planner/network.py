"""What the ranks send each other in one optimizer step, from shapes: formulas, nothing is sent.

Symbols: T trainable and F frozen parameters, P = T + F, N ranks, a micro-batches of a step, b bytes of a gradient on
its way (2 in bf16, 4 in fp32; ``communication_data_type`` in ``train.deepspeed`` goes first), w bytes of a weight.

After the sources of DeepSpeed 0.19, and counted in two-rank steps by a test:

=====  ================================================================================================================
stage  tensors given to collectives in one step
=====  ================================================================================================================
0      all-reduce b T, once: gradients accumulate on each rank
1      all-reduce b T, once (in bf16 from sums in float32); after the step all-gather w T
2      all-reduce b T at every micro-batch, of which a rank keeps only its part; after the step all-gather w T. With
       ``use_multi_rank_bucket_allreduce: false`` reduce each part to its rank (and at stage 1 in fp32)
3      reduce-scatter b T at every micro-batch. All-gather w P at every micro-batch, in forward; in backward at most
       P - D / 2 again, where D is ``stage3_max_reuse_distance``: the last layers are kept, their next use is near.
       Parameters of at most ``stage3_param_persistence_threshold`` elements once a step, and larger adapters of
       resident layers once more
=====  ================================================================================================================

Frozen weights have no gradient: below stage 3 a step moves adapters, embeddings, norms and head only. In a ring of N
ranks a device sends 2 (N - 1) / N of what is all-reduced and (N - 1) / N of what is gathered, reduced or
reduce-scattered; gloo's reduce is no ring, and sends more than its all-reduce (docs/clusters.md). Where the ring goes
through hosts in order, each host sends as much to the next one as each of its devices to its neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.schema import Config
from relora_mora.optim.groups import count_parameters, group_moments
from relora_mora.sizing.optimizer import exchanged_bytes
from relora_mora.sizing.setup import MAX_REUSE_DISTANCE, Setup

_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that one rank gives to collectives in a step; a merge's apart.

    ``all_reduced`` are gradients whose sum every rank gets, ``reduced`` those whose sum only its owner gets;
    ``gathered`` the weights that training waits for: after the step, or in forward and backward at stage 3. ``merge``
    is one merge event: adapters to the owners of the base, new weights back; ``state`` are the adapters' moments, which
    every rank gets whole in it for a reset that keeps some of them. ``exchanged`` are the pieces of matrices that an
    optimizer needs whole (``optimizer.py``), there and back.
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
        """Bytes that a device sends in a step for its gradients, in a ring."""
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
    """What one step moves; ``model`` may be on the meta device."""
    config = setup.config
    stage = setup.stage
    ranks = setup.world_size
    width = setup.width
    counts = count_parameters(model)
    gradients = _WIDTHS.get(str(config.train.deepspeed.get("communication_data_type")), width) * counts.trainable
    merges = config.method.merges and ranks > 1
    merge = _merge(model, stage, width) if merges else 0
    state = _state(counts.adapters, config) if merges and stage else 0
    if stage < 3:
        gradients *= setup.micro_batches if stage == 2 else 1
        honours = stage == 2 or (stage == 1 and not setup.bf16)  # BF16_Optimizer has its own way
        to_owners = honours and not setup.zero("use_multi_rank_bucket_allreduce", True)
        everywhere, to_one = (0.0, gradients) if to_owners else (gradients, 0.0)
        return Traffic(ranks, everywhere, to_one, width * counts.trainable if stage else 0, merge, state)
    every = counts.trainable + counts.frozen
    small = setup.persistence_threshold
    persistent = sum(p.numel() for p in model.parameters() if p.numel() <= small)
    again = max(0, every - setup.zero("stage3_max_reuse_distance", MAX_REUSE_DISTANCE) / 2)
    to_build = sum(size for size in _resident_adapters(model) if size > small)
    gathered = width * (setup.micro_batches * (every - persistent + again) + persistent + to_build)
    exchanged = exchanged_bytes(model, setup)
    return Traffic(ranks, 0, gradients * setup.micro_batches, gathered, merge, state, exchanged)


def _resident_adapters(model: PreTrainedModel) -> Iterator[int]:
    """Elements of each adapter parameter of the resident layers."""
    for _, layer in adapter_layers(model):
        if layer.resident:
            yield from (getattr(layer, name).numel() for name in layer.adapter_names)


def _merge(model: PreTrainedModel, stage: int, width: int) -> float:
    """Adapters reduced to the owners in float32, weights broadcast (at stage 3 gathered before), masters written."""
    counts = count_parameters(model)
    weights = width * sum(layer.weight.numel() for _, layer in adapter_layers(model))
    if stage == 0:
        return weights
    return 4 * counts.adapters + (2 * weights if stage == 3 else weights + width * counts.trainable)


def _state(adapters: int, config: Config) -> float:
    """What of the adapters' moments, in float32, a reset looks at whole."""
    if config.method.reset in ("full", "none"):
        return 0.0
    return 4.0 * adapters * len(group_moments("adapters", config.optim.matrices))
