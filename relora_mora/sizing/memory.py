"""The memory of one device, part by part: formulas from shapes, nothing is allocated.

Symbols: T trainable and F frozen parameters, N ranks, b bytes of the compute type (2 in bf16, 4 in fp32), n tokens of a
micro-batch, h hidden size, f intermediate size, q and k widths of queries and keys, V vocabulary size, R size of a
square matrix. Activations are bytes per token.

The formulas follow the sources of DeepSpeed 0.19 and transformers 5.24:

==============  ======================================================================================================
part            bytes
==============  ======================================================================================================
weights         b (T + F); stage 3: b (T + F) / N. If weights under adapters are stored in 8 bits, each output feature
                of in weights takes in + 4 bytes
merged          ``W + delta`` of resident linears, stored as W is, from the first forward to the last backward of a step
gathered        stage 3: forward gathers other ranks' weights and keeps them for backward (because of DeepSpeed's
                default reuse distance), the bytes of T + F, at most those of ``stage3_max_live_parameters``
                parameters; parameters of at most
                ``stage3_param_persistence_threshold`` elements always stay gathered
masters         float32 copies of the trainable parameters: 4 T, stages 1-3: 4 T / N. None in fp32 at stage 0; at
                stages 1-3 DeepSpeed clones them even if the parameters are float32 already
optimizer       Adam's two moments: 8 T, stages 1-3: 8 T / N; other optimizers: ``work.py``
gradients       stage 0: b T, and 4 T more during a bf16 step. Stage 1 in bf16: b T and a float32 sum of 4 T, which
                stays. Stage 1 in fp32: 4 T between micro-batches, then 4 T / N. Stages 2 and 3: 4 T / N, which stays at
                stage 3. An fp32 step at stages 1-3 copies 4 T / N. The reduction of stage 1 in bf16 copies 2 bytes per
                element of the parameter groups that it reduces at once (until these have more than 500 M elements), and
                4 more bytes if there are several of these groups
buffers         one bucket of ``reduce_bucket_size`` elements of b bytes at stages 2 and 3, and at 1 in fp32; with
                ``overlap_comm`` a second one at stages 1 and 2
activations     a layer keeps 2 h (4 + b) for its norms, (q + k) (4 + b) if queries and keys have their own norms,
                and b (2 q + 2 k) for attention; eager attention keeps each head's weights in float32 and, in bf16, a
                rounded copy; 3 b f for the gated product; and
                the inputs of its linears: b (2 h + f) if they or their LoRA train, b R for each linear with MoRA, which
                keeps only ``C x``. A compiled layer recomputes norms and the gated product, and keeps 2 h b and 2 b f
                for them. With activation checkpointing b h per layer, and one whole layer
scratch         at the loss: one chunk of logits, 6 V in bf16 and 4 V in fp32 per token, and the head's gradient
                (4 + b) h V; on a GPU b V per token and 4 h V, and afterwards (4 + b) h V. In backward: the gradients of
                the gated product, 2 b f per token, or of eager attention's weights, and ``W + delta`` of one linear
                that is not resident; with products in 8 bits, the sums of the widest linear, (4 + b) f per token. In
                the step: the workspace of a matrix optimizer (``work.py``)
==============  ======================================================================================================

A frozen weight has a float32 copy in the host memory of one rank, the i-th on rank i mod N: about 4 F / N. With a GPU
the copy is pinned, and torch rounds its bytes up to a power of two. The first rank reads all of ``model.init_from`` in
float32, 4 bytes per parameter without adapters, until weights and copies are filled.
The CUDA context, fragmentation and the Python process itself are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from relora_mora.adapters.inject import INPUTS, decoder_linears, storage_of
from relora_mora.adapters.layers import INPUT, AdapterLinear, Kept, adapter_layers
from relora_mora.adapters.stored import PLAIN
from relora_mora.config.checks.deepspeed import zero_defaults
from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import Config
from relora_mora.model.documents import flash_supports
from relora_mora.model.loss import bytes_per_logit, loss_chunk
from relora_mora.model.widths import attention_widths, feed_forward_width, head_width
from relora_mora.optim.groups import count_parameters, parameter_groups
from relora_mora.sizing import work
from relora_mora.sizing.setup import MAX_LIVE_PARAMETERS, Setup

REDUCED_TOGETHER = 500_000_000  # elements that DeepSpeed reduces at once at stage 1 in bf16; the last group may exceed

PARTS = ("weights", "merged", "gathered", "masters", "optimizer", "gradients", "buffers", "activations", "scratch")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a step, and bytes of a rank in host memory.

    ``host_base``: the float32 copies of frozen weights. ``host_checkpoint``: masters and moments on their way to disk;
    pinned memory for them may take twice as much. ``host_start``: the initial weights on the first rank, until they
    have been copied to their places.
    """

    phase: str  # loss | backward's start | backward's end | reduction | step
    weights: float
    merged: float = 0
    gathered: float
    masters: float
    optimizer: float
    gradients: float = 0
    buffers: float
    activations: float = 0
    scratch: float = 0
    host_base: float
    host_checkpoint: float
    host_start: float

    @property
    def device(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


def peak_memory(model: PreTrainedModel, setup: Setup) -> Memory:
    """Memory of one device at the peak of a step: the largest of its phases (see ``Memory.phase``)."""
    state = state_memory(model, setup)
    gradients = gradient_memory(group_sizes(model, setup.config.optim), setup)
    before = gradients.between_micro_batches if setup.micro_batches > 1 else gradients.between_steps
    merged = merged_memory(model, setup)
    live = replace(state, merged=merged, gradients=before, gathered=max(state.gathered, gathered_memory(model, setup)))
    kept, layer, mask = activation_memory(model, setup)
    again = layer if setup.config.model.activation_checkpointing else 0
    at_loss, in_backward = scratch_memory(model, setup)
    phases = [
        replace(live, phase="loss", activations=kept, scratch=at_loss),
        replace(live, phase="backward's start", activations=kept + again, scratch=in_backward),
        replace(
            state,
            phase="backward's end",
            merged=merged,
            gradients=gradients.after_backward,
            activations=layer + mask,
            scratch=in_backward,
        ),
        replace(state, phase="reduction", merged=merged, gradients=gradients.in_reduction),
        replace(state, phase="step", gradients=gradients.in_step, scratch=work.scratch_bytes(model, setup)),
    ]
    return max(phases, key=lambda memory: memory.device)


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
        phase="between steps",
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
    config = setup.config
    width = setup.width
    hidden = model.config.hidden_size
    of_norm = 4 + (width if config.method.train_norms else 0)
    final_norm = hidden * of_norm + 4  # it is not compiled
    if setup.compiles:
        of_norm = width
    norms = 2 * (hidden * of_norm + 4) + _normed_heads(model) * (head_width(model.config) * of_norm + 4)
    attention, mask = _attention_activations(model, setup)
    gated_product = (2 if setup.compiles else 3) * width * feed_forward_width(model.config)
    layer = norms + attention + gated_product + width * _linear_inputs(model, config)
    of_layer = width * hidden if config.model.activation_checkpointing else layer
    ends = final_norm + 2 * width * hidden  # and the head's input with its gradient
    tokens = config.tokens_per_micro_batch
    kept = model.config.num_hidden_layers * of_layer + ends + mask
    return tokens * kept, tokens * layer, tokens * mask


def _normed_heads(model: PreTrainedModel) -> int:
    """The number of query and key heads that have their own norm, as in Qwen3; 0 if the model has no such norms."""
    normed = any(name.endswith(".q_norm") for name, _ in model.named_modules())
    queries, keys = attention_widths(model.config)
    return (queries + keys) // head_width(model.config) if normed else 0


def _is_eager(model: PreTrainedModel, config: Config) -> bool:
    attention = config.model.attention
    return (model.config._attn_implementation if attention == "auto" else attention) == "eager"


def _attention_activations(model: PreTrainedModel, setup: Setup) -> tuple[int, int]:
    """Bytes per token: (kept by the attention of a layer, of the mask)."""
    config = setup.config
    heads = model.config.num_attention_heads
    length = config.data.sequence_length
    queries, keys = attention_widths(model.config)
    eager = _is_eager(model, config)
    fused = setup.on_gpu and not eager
    flash = fused and flash_supports(head_width(model.config), _compute_type(setup))
    masked = eager or (config.data.masks_documents and not flash)
    if masked or (fused and not flash):
        keys = queries  # keys and values are repeated for every head
    kept = setup.width * (2 * queries + 2 * keys) + 4 * heads
    if eager:
        kept += heads * length * (6 if setup.bf16 else 4)  # softmax in float32, and its rounded copy
    return kept, setup.width * length if masked else 0


def _linear_inputs(model: PreTrainedModel, config: Config) -> float:
    """Elements per token that the linears of a decoder layer keep for their gradients, averaged over the layers.

    An input that several linears share is kept once. The input of ``o_proj`` is attention's output, which is kept
    anyway.
    """
    elements: dict[tuple[str, str, str], int] = {}
    for name, layer in decoder_linears(model):
        prefix, _, kind = name.rpartition(".")
        source = INPUTS.get(kind, kind)
        for kept in _kept(layer, config):
            if (source, kept.what) != ("o_proj", INPUT):
                elements[prefix, source if kept.shared else kind, kept.what] = kept.elements
    return sum(elements.values()) / model.config.num_hidden_layers


def _kept(layer: torch.nn.Linear | AdapterLinear, config: Config) -> list[Kept]:
    if isinstance(layer, AdapterLinear):
        return layer.kept(config.tokens_per_micro_batch, config.method.cycle)
    return [Kept(INPUT, layer.in_features, shared=True)] if layer.weight.requires_grad else []


def _compute_type(setup: Setup) -> torch.dtype:
    return torch.bfloat16 if setup.bf16 else torch.float32


def scratch_memory(model: PreTrainedModel, setup: Setup) -> tuple[float, float]:
    """Bytes of temporary memory: (at the loss, in backward)."""
    config = setup.config
    on_gpu = setup.on_gpu
    width = setup.width
    tokens = config.tokens_per_micro_batch
    vocabulary = model.config.vocab_size
    logit = bytes_per_logit(_compute_type(setup), in_place=on_gpu)
    chunk = min(tokens, loss_chunk(tokens, vocabulary, logit, on_gpu=on_gpu))
    head = model.get_output_embeddings().weight
    trains = head.numel() if head.requires_grad else 0
    rounded = (4 + width) * trains
    logits = chunk * vocabulary * logit
    at_loss = max(logits + 4 * trains, rounded) if on_gpu else logits + rounded
    built = 0.0  # elements of the compute type
    multiplies = False
    for _, layer in adapter_layers(model):
        multiplies = multiplies or layer.stored.multiplies
        builds = 0.0
        if not layer.resident and layer.uses_merged_form(tokens):
            builds = layer.weights_built
        if layer.stored != PLAIN and not layer.stored.multiplies:
            builds += 1 + 4 / width  # W in the compute type, and in float32 before that
        built = max(built, builds * layer.weight.numel())
    in_backward = (4 + width if multiplies else 2 * width) * tokens * feed_forward_width(model.config)
    if _is_eager(model, config):
        # in float32 before and after the softmax, when the gated product and the rounded weights have been freed
        weights = tokens * model.config.num_attention_heads * config.data.sequence_length
        in_backward = max(in_backward, weights * (6 if setup.bf16 else 8) - 1.5 * in_backward)
    return at_loss, in_backward + width * (built + trains)
