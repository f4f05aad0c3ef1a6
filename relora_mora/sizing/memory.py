"""The memory of one device, part by part: formulas from the sources of DeepSpeed 0.19, and measured activations.

The CUDA context, fragmentation and the Python process itself are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from relora_mora.adapters.inject import storage_of
from relora_mora.adapters.layers import AdapterLinear, adapter_layers
from relora_mora.adapters.stored import EightBits
from relora_mora.config.checks.deepspeed import zero_defaults
from relora_mora.config.optim import OptimConfig
from relora_mora.optim.groups import count_parameters, parameter_groups
from relora_mora.sizing import work
from relora_mora.sizing.measure import measure
from relora_mora.sizing.setup import MAX_LIVE_PARAMETERS, Setup

REDUCED_TOGETHER = 500_000_000  # elements that DeepSpeed reduces at once at stage 1 in bf16; the last group may exceed

PARTS = ("weights", "merged", "gathered", "masters", "optimizer", "gradients", "buffers", "activations", "scratch")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a step, and bytes of a rank in host memory.

    ``merged``: ``W + delta`` of resident layers. ``gathered``: weights of other ranks at stage 3. ``masters``: float32
    copies of what trains. ``buffers``: buckets of the reduction. ``scratch``: what lives for a moment.
    ``host_base``: the float32 copies of frozen weights. ``host_checkpoint``: masters and moments on their way to disk;
    pinned memory for them may take twice as much. ``host_start``: the initial weights on the first rank, until they
    have been copied to their places.
    """

    phase: str = "between steps"
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
    """Memory of one device at the peak of a step: the largest of its phases."""
    state = state_memory(model, setup)
    gradients = gradient_memory(group_sizes(model, setup.config.optim), setup)
    before = gradients.between_micro_batches if setup.micro_batches > 1 else gradients.between_steps
    scratch = work.scratch_bytes(model, setup)
    gathered = max(state.gathered, gathered_memory(model, setup))
    seen = measure(model, setup)
    until_reduced = replace(state, merged=merged_memory(model, setup))
    phases = [
        replace(
            until_reduced,
            phase="backward",
            gathered=gathered,
            gradients=before,
            activations=seen.kept,
            scratch=seen.most - seen.kept,
        ),
        replace(until_reduced, phase="end of backward", gradients=gradients.after_backward, activations=seen.at_end),
        replace(until_reduced, phase="reduction", gradients=gradients.in_reduction),
        replace(state, phase="step", gradients=gradients.in_step, scratch=scratch),
    ]
    return max(phases, key=lambda memory: memory.device)


def state_memory(model: PreTrainedModel, setup: Setup) -> Memory:
    """The state that stays between steps, without gradients."""
    counts = count_parameters(model)
    stage, trained = setup.stage, counts.trainable
    defaults = zero_defaults(stage, setup.world_size, trained, on_gpu=setup.on_gpu)
    bucket = min(trained, setup.zero("reduce_bucket_size", defaults["reduce_bucket_size"]))
    overlaps = stage < 3 and setup.zero("overlap_comm", defaults.get("overlap_comm", False))
    # stage 1 in bf16 reduces without a bucket; the next one is filled while one is sent
    buckets = (2 if overlaps else 1) if stage >= 2 or (stage == 1 and not setup.bf16) else 0
    optim = setup.config.optim
    return Memory(
        weights=weight_bytes(model, setup) / setup.weight_sharers,
        gathered=setup.width * setup.persistent(model) if setup.weight_sharers > 1 else 0,
        # DeepSpeed clones them at stages 1-3 even if the parameters are float32 already
        masters=4 * trained / setup.sharers if setup.bf16 or stage > 0 else 0,
        optimizer=work.state_bytes(model, optim, setup.sharers),
        buffers=setup.width * bucket * buckets,
        host_base=_host_base(model, setup.world_size, pinned=setup.on_gpu),
        host_checkpoint=4 * trained / setup.world_size + work.state_bytes(model, optim, setup.world_size),
        host_start=0 if setup.config.model.init_from is None else 4 * counts.total,
    )


def weight_bytes(model: PreTrainedModel, setup: Setup) -> int:
    """Bytes of all parameters as the model computes with them."""
    every = sum(parameter.numel() for parameter in model.parameters())
    saved = sum(setup.width * layer.weight.numel() - stored_bytes(layer, setup) for _, layer in adapter_layers(model))
    return setup.width * every - saved


def stored_bytes(layer: AdapterLinear, setup: Setup) -> int:
    """Bytes of the weight under an adapter, or of its ``W + delta`` if that is resident."""
    stored = storage_of(layer, setup.config.method, on_gpu=setup.on_gpu)
    return stored.empty(layer.weight).nbytes if isinstance(stored, EightBits) else setup.width * layer.weight.numel()


def merged_memory(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of ``W + delta`` in all resident layers."""
    return sum(stored_bytes(layer, setup) for _, layer in adapter_layers(model) if layer.resident)


def gathered_memory(model: PreTrainedModel, setup: Setup) -> float:
    """Bytes of gathered weights at stage 3 when they are largest, at the end of forward: backward uses them again."""
    if setup.weight_sharers == 1:
        return 0
    every = sum(parameter.numel() for parameter in model.parameters())
    live = min(every, setup.zero("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
    return weight_bytes(model, setup) * live / every


def _host_base(model: PreTrainedModel, world_size: int, *, pinned: bool) -> float:
    """Bytes of float32 copies on the rank with the most; the i-th frozen weight belongs to rank i mod world size."""
    sizes = [4 * parameter.numel() for parameter in model.parameters() if not parameter.requires_grad]
    if pinned:  # torch rounds up to a power of two
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
    whole = 4 * sum(groups)  # in float32
    part = whole / setup.world_size
    if stage == 0 and setup.bf16:
        return GradientMemory(0, whole / 2, whole / 2, whole / 2, 1.5 * whole)
    if stage == 0:
        return GradientMemory(0, whole, whole, whole, whole)
    if stage == 1 and setup.bf16:  # the float32 sums stay between steps
        held = 1.5 * whole
        return GradientMemory(whole, held, held, held + _reduction_copies(groups), held)
    in_step = part if setup.bf16 else 2 * part
    if stage == 1:
        return GradientMemory(0, whole, part, part, in_step)
    return GradientMemory(part if stage == 3 else 0, part, part, part, in_step)


def _reduction_copies(groups: Sequence[int]) -> int:
    """Bytes that DeepSpeed copies at a time (``DeepSpeedEngine.allreduce_no_retain``): in bf16, and again if several
    groups are joined in float32."""
    together: list[list[int]] = [[]]
    for size in groups:
        if sum(together[-1]) > REDUCED_TOGETHER:
            together.append([])
        together[-1].append(size)
    return max((6 if len(sizes) > 1 else 2) * sum(sizes) for sizes in together)
