"""The memory of one device, part by part; nothing is allocated.

What layers keep for backward, and need in it, is measured (``measured.py``). The rest are formulas that follow the
sources of DeepSpeed 0.19. Symbols: T trainable and F frozen parameters, N ranks, b bytes of the compute type (2 in
bf16, 4 in fp32), h hidden size, V vocabulary size. Activations are bytes per token.

===========  =========================================================================================================
part         bytes
===========  =========================================================================================================
weights      b (T + F); stage 3: b (T + F) / N. Weights in 8 bits under adapters have their own size
merged       ``W + delta`` of resident linears, stored as W is, from the first forward to the last backward of a step
gathered     stage 3: forward gathers other ranks' weights and keeps them for backward (DeepSpeed's default reuse
             distance), at most ``stage3_max_live_parameters``; parameters of at most
             ``stage3_param_persistence_threshold`` elements always stay gathered
masters      float32 copies of the trainable parameters: 4 T, stages 1-3: 4 T / N. None in fp32 at stage 0; at stages
             1-3 DeepSpeed clones them even if the parameters are float32 already
optimizer    Adam's two moments: 8 T, stages 1-3: 8 T / N; other optimizers: ``work.py``
gradients    stage 0: b T, and 4 T more during a bf16 step. Stage 1 in bf16: b T and a float32 sum of 4 T, which
             stays. Stage 1 in fp32: 4 T between micro-batches, then 4 T / N. Stages 2 and 3: 4 T / N, which stays at
             stage 3. An fp32 step at stages 1-3 copies 4 T / N. The reduction of stage 1 in bf16 copies 2 bytes per
             element of the parameter groups that it reduces at once (until these have more than 500 M elements), and
             4 more bytes if there are several of these groups
buffers      one bucket of ``reduce_bucket_size`` elements of b bytes at stages 2 and 3, and at 1 in fp32; with
             ``overlap_comm`` a second one at stages 1 and 2
activations  measured. A compiled layer recomputes its norms and the gated product, for which it keeps b instead of
             4 + b bytes (4 if the norms do not train) and two tensors instead of three. With activation checkpointing
             b h per layer, and one whole layer
scratch      at the loss: one chunk of logits, 6 V in bf16 and 4 V in fp32 per token, and the head's gradient
             (4 + b) h V; on a GPU b V per token and 4 h V, and afterwards (4 + b) h V. In backward: measured, and the
             head's gradient. In the step: the workspace of a matrix optimizer (``work.py``)
===========  =========================================================================================================

A frozen weight has a float32 copy in the host memory of one rank, the i-th on rank i mod N: about 4 F / N. With a GPU
the copy is pinned, and torch rounds its bytes up to a power of two. The first rank reads all of ``model.init_from`` in
float32, 4 bytes per parameter without adapters, until weights and copies are filled.
The CUDA context, fragmentation and the Python process itself are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from relora_mora.adapters.inject import storage_of
from relora_mora.adapters.layers import AdapterLinear, adapter_layers
from relora_mora.config.checks.deepspeed import zero_defaults
from relora_mora.config.optim import OptimConfig
from relora_mora.model.config import head_width
from relora_mora.model.loss import bytes_per_logit, loss_chunk
from relora_mora.optim.groups import count_parameters, parameter_groups
from relora_mora.sizing import work
from relora_mora.sizing.measured import measure
from relora_mora.sizing.setup import MAX_LIVE_PARAMETERS, Setup

REDUCED_TOGETHER = 500_000_000  # elements that DeepSpeed reduces at once at stage 1 in bf16; the last group may exceed

PARTS = ("weights", "merged", "gathered", "masters", "optimizer", "gradients", "buffers", "activations", "scratch")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, and bytes of a rank in host memory.

    ``host_base``: the float32 copies of frozen weights. ``host_checkpoint``: masters and moments on their way to disk;
    pinned memory for them may take twice as much. ``host_start``: the initial weights on the first rank, until they
    have been copied to their places.
    """

    weights: float
    masters: float
    optimizer: float
    host_base: float
    host_checkpoint: float
    host_start: float
    gathered: float = 0
    buffers: float = 0
    merged: float = 0
    gradients: float = 0
    activations: float = 0
    scratch: float = 0
    phase: str = "between steps"  # or loss, backward's start, backward's end, reduction, step

    @property
    def device(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


def peak_memory(model: PreTrainedModel, setup: Setup) -> Memory:
    """Memory of one device at the peak of a step: the largest of its phases (see ``Memory.phase``)."""
    gradients = gradient_memory(group_sizes(model, setup.config.optim), setup)
    kept, layer, mask = activation_memory(model, setup)
    again = layer if setup.config.model.activation_checkpointing else 0
    at_loss, in_backward = scratch_memory(model, setup)
    step = replace(
        state_memory(model, setup), phase="step", gradients=gradients.in_step, scratch=work.scratch_bytes(model, setup)
    )
    reduction = replace(
        step, phase="reduction", merged=merged_memory(model, setup), gradients=gradients.in_reduction, scratch=0
    )
    end = replace(
        reduction,
        phase="backward's end",
        gradients=gradients.after_backward,
        activations=layer + mask,
        scratch=in_backward,
    )
    start = replace(
        end,
        phase="backward's start",
        gradients=gradients.between_micro_batches if setup.micro_batches > 1 else gradients.between_steps,
        gathered=max(end.gathered, gathered_memory(model, setup)),
        activations=kept + again,
    )
    loss = replace(start, phase="loss", activations=kept, scratch=at_loss)
    return max((loss, start, end, reduction, step), key=lambda memory: memory.device)


def state_memory(model: PreTrainedModel, setup: Setup) -> Memory:
    """The state that stays between steps, without gradients."""
    counts = count_parameters(model)
    stage = setup.stage
    defaults = zero_defaults(stage, setup.world_size, counts.trainable, on_gpu=setup.on_gpu)
    bucket = min(counts.trainable, setup.zero("reduce_bucket_size", defaults["reduce_bucket_size"]))
    overlaps = stage < 3 and setup.zero("overlap_comm", defaults.get("overlap_comm", False))
    buckets = (2 if overlaps else 1) if stage >= 2 or (stage == 1 and not setup.bf16) else 0
    persistent = sum(p.numel() for p in model.parameters() if p.numel() <= setup.persistence_threshold)
    return Memory(
        weights=weight_bytes(model, setup) / setup.weight_sharers,
        gathered=setup.width * persistent if setup.weight_sharers > 1 else 0,
        masters=4 * counts.trainable / setup.sharers if setup.bf16 or stage > 0 else 0,
        optimizer=work.state_bytes(model, setup.config.optim, setup.sharers),
        buffers=setup.width * bucket * buckets,
        host_base=_host_base(model, setup.world_size, pinned=setup.on_gpu),
        host_checkpoint=4 * counts.trainable / setup.world_size
        + work.state_bytes(model, setup.config.optim, setup.world_size),
        host_start=0 if setup.config.model.init_from is None else 4 * counts.total,
    )


def weight_bytes(model: PreTrainedModel, setup: Setup) -> int:
    """Bytes of all parameters as the model computes with them."""
    counts = count_parameters(model)
    saved = sum(setup.width * layer.weight.numel() - stored_bytes(layer, setup) for _, layer in adapter_layers(model))
    return setup.width * (counts.trainable + counts.frozen) - saved


def stored_bytes(layer: AdapterLinear, setup: Setup) -> int:
    """Bytes of the weight under an adapter, or of its ``W + delta`` if that is resident."""
    stored = storage_of(layer, setup.config.method, on_gpu=setup.on_gpu)
    return stored.bytes_of(layer.weight.numel(), setup.width)


def merged_memory(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of ``W + delta`` in all resident layers."""
    return sum(stored_bytes(layer, setup) for _, layer in adapter_layers(model) if layer.resident)


def gathered_memory(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of gathered weights at stage 3 when they are largest, at the end of forward."""
    if setup.weight_sharers == 1:
        return 0
    every = sum(parameter.numel() for parameter in model.parameters())
    live = min(every, setup.zero("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
    return weight_bytes(model, setup) * live / every


def _host_base(model: PreTrainedModel, world_size: int, *, pinned: bool) -> float:
    """Bytes of float32 copies on the rank with the most; the i-th frozen weight belongs to rank i mod world size."""
    sizes = [4 * parameter.numel() for parameter in model.parameters() if not parameter.requires_grad]
    if pinned:
        sizes = [1 << (size - 1).bit_length() for size in sizes]
    return max(sum(sizes[rank::world_size]) for rank in range(world_size))


@dataclass(frozen=True)
class GradientMemory:
    """Bytes of gradients in five phases; the last two include the copies made in that phase."""

    between_steps: float
    between_micro_batches: float
    after_backward: float
    in_reduction: float
    in_step: float


def group_sizes(model: PreTrainedModel, optim: OptimConfig) -> list[int]:
    """The number of elements in each of the optimizer's parameter groups."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return [sum(sizes[name] for name in group.parameters) for group in parameter_groups(model, optim)]


def gradient_memory(groups: Sequence[int], setup: Setup) -> GradientMemory:
    """``groups``: the number of elements of each parameter group, in the optimizer's order."""
    stage = setup.stage
    bf16 = setup.bf16
    whole = 4 * sum(groups)
    part = whole / setup.world_size
    if stage == 0 and bf16:
        return GradientMemory(0, whole / 2, whole / 2, whole / 2, 1.5 * whole)
    if stage == 0:
        return GradientMemory(0, whole, whole, whole, whole)
    if stage == 1 and bf16:
        held = 1.5 * whole
        return GradientMemory(whole, held, held, held + _reduction_copies(groups), held)
    in_step = part if bf16 else 2 * part
    if stage == 1:
        return GradientMemory(0, whole, part, part, in_step)
    return GradientMemory(part if stage == 3 else 0, part, part, part, in_step)


def _reduction_copies(groups: Sequence[int]) -> int:
    """Bytes that DeepSpeed copies at a time (``DeepSpeedEngine.allreduce_no_retain``)."""
    together: list[list[int]] = [[]]
    for size in groups:
        if sum(together[-1]) > REDUCED_TOGETHER:
            together.append([])
        together[-1].append(size)
    return max((6 if len(sizes) > 1 else 2) * sum(sizes) for sizes in together)


def activation_memory(model: PreTrainedModel, setup: Setup) -> tuple[float, float, float]:
    """Activation bytes of one micro-batch: (kept by forward for backward, needed by one decoder layer, the mask).

    All layers share one mask, which forward keeps.
    """
    measured = measure(model, setup)
    config = setup.config
    tokens = config.tokens_per_micro_batch
    layer = measured.kept - (tokens * _recomputed(model, setup) if setup.compiles else 0)
    of_layer = tokens * setup.width * model.config.hidden_size if config.model.activation_checkpointing else layer
    return model.config.num_hidden_layers * of_layer + measured.ends + measured.mask, layer, measured.mask


def _recomputed(model: PreTrainedModel, setup: Setup) -> int:
    """Bytes per token that a compiled layer does not keep, because its backward computes them again."""
    layer = model.model.layers[0]
    shapes = model.config
    heads = shapes.num_attention_heads + shapes.num_key_value_heads if hasattr(layer.self_attn, "q_norm") else 0
    normed = 2 * shapes.hidden_size + heads * head_width(shapes)
    of_norm = 4 if setup.config.method.train_norms else 4 - setup.width
    return normed * of_norm + setup.width * shapes.intermediate_size


def scratch_memory(model: PreTrainedModel, setup: Setup) -> tuple[float, float]:
    """Bytes of temporary memory: (at the loss, in backward)."""
    on_gpu = setup.on_gpu
    tokens = setup.config.tokens_per_micro_batch
    vocabulary = model.config.vocab_size
    logit = bytes_per_logit(torch.bfloat16 if setup.bf16 else torch.float32, in_place=on_gpu)
    logits = min(tokens, loss_chunk(tokens, vocabulary, logit, on_gpu=on_gpu)) * vocabulary * logit
    head = model.get_output_embeddings().weight
    trains = vocabulary * model.config.hidden_size if head.requires_grad else 0
    rounded = (4 + setup.width) * trains
    at_loss = max(logits + 4 * trains, rounded) if on_gpu else logits + rounded
    return at_loss, measure(model, setup).scratch + setup.width * trains
