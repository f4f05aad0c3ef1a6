"""Checks that adapters are smaller than their weights, and that the training state fits into memory."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import choose_storage, decoder_linears, inject
from relora_mora.adapters.layers import AdapterLinear, adapter_layers
from relora_mora.adapters.stored import PLAIN
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config, MethodConfig
from relora_mora.model.causal import empty_model
from relora_mora.sizing.memory import peak_memory, state_memory
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model
from relora_mora.system.logs import counted

USABLE = 0.9  # share of a device's memory; the CUDA context, NCCL's buffers and fragmentation take the rest
VECTOR = 8  # bf16 elements in 16 bytes
RESIDENT_SHARE = 0.5  # the largest share of the memory that a step with resident layers may be planned to take


def check_adapters(model_config: PreTrainedConfig, method: MethodConfig) -> None:
    """Raises :class:`ConfigError` if an adapter has no linear, or if all adapters are larger than their weights."""
    if not method.uses_adapters:
        return
    lm = empty_model(model_config)
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name, _ in decoder_linears(lm)))
    missing = {
        f"method.{setting}: {kind} is not a linear of the decoder layers; they have {', '.join(kinds) or 'none'}"
        for setting in ("target_modules", "rank_pattern")
        for kind in getattr(method, setting) or ()
        if kind not in kinds
    }
    if missing or not kinds:
        raise ConfigError(sorted(missing) or ["method.name: this model has no linears; use full"], "the settings")
    try:
        with torch.device("meta"):
            inject(lm, method, seed=0)
    except ValueError as error:
        raise ConfigError([str(error)], "the settings") from error


def uneven_widths(model_config: PreTrainedConfig) -> list[str]:
    """One note for each width that makes a GPU slow, with the next good width.

    cuBLAS wants rows of whole 16-byte vectors in all matrices of a product ("Tensor Core Usage" in its documentation).
    """
    widths = ("hidden_size", "intermediate_size", "vocab_size")
    return [
        f"{name} of {width:,} is not a multiple of {VECTOR}: a GPU is slow with its products; "
        f"{-(-width // VECTOR) * VECTOR:,} would be better for a new model"
        for name in widths
        if (width := getattr(model_config, name, VECTOR)) % VECTOR
    ]


def check_memory(model_config: PreTrainedConfig, setup: Setup, available: float, on_host: float) -> None:
    """Raises :class:`ConfigError` if the permanent state of a rank needs more than its ``available`` bytes.

    The state consists of weights, masters, optimizer state, and the rank's part of the float32 base. If the rank uses
    a GPU, the base has to fit into the ``on_host`` bytes of host memory instead.
    """
    model = meta_model(model_config, setup.config.method)
    _check_matrices(model, setup.config)
    state = state_memory(model, setup)
    on_device = state.weights + state.masters + state.optimizer
    sizes = {"weights and optimizer state": (on_device + (0 if setup.on_gpu else state.host_base), available)}
    if setup.on_gpu:
        sizes["the base weights in host memory"] = (state.host_base, on_host)
    for part, (size, limit) in sizes.items():
        if size > limit:
            fault = (
                f"model: {part} need {size / 2**30:,.1f} GiB on each of {counted(setup.world_size, 'rank')}, and each "
                f"has {limit / 2**30:,.1f}; take a smaller model, more devices or hosts, or a higher "
                "train.zero_stage: relora-mora plan says what a run needs"
            )
            raise ConfigError([fault], "the settings")


def _check_matrices(model: PreTrainedModel, config: Config) -> None:
    """Raises :class:`ConfigError` if a rule for matrices would step a parameter with more dimensions."""
    if config.optim.of_group("linears").rule is None:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() > 2:
            fault = (
                f"optim.matrices: {config.optim.matrices} steps matrices, and {name} has {parameter.dim()} dimensions; "
                "use adamw, or a method with adapters and method.train_experts=false"
            )
            raise ConfigError([fault], "the settings")


def choose_forms(model: PreTrainedModel, setup: Setup, available: float | None) -> None:
    """Decides how adapter layers store their weights, and which layers are resident.

    If ``method.form`` is ``auto``, layers are resident only if a step is planned to take at most half of the
    ``available`` bytes of a rank (None: unknown, and assumed to be enough). With products in 8 bits that is the faster
    form. Otherwise layers become resident that would build ``W + delta`` for each use, on CPUs if there are several
    micro-batches. Layers are never resident at stage 3, because no rank has a whole weight. If products are not in 8
    bits, both forms give the same bits, so ranks and resumes may choose differently; in compiled layers they agree up
    to rounding.
    """
    method = setup.config.method
    choose_storage(model, method, on_gpu=setup.on_gpu)
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        layer.resident = setup.stage < 3 and _should_stay(layer, setup)
    if method.form != "auto" or available is None or not any(layer.resident for layer in layers):
        return
    needed = peak_memory(model, setup).device
    for layer in layers:
        layer.resident = layer.resident and needed <= RESIDENT_SHARE * available


def _should_stay(layer: AdapterLinear, setup: Setup) -> bool:
    """Whether ``W + delta`` of a layer is to be resident if there is memory for it."""
    if layer.form != "auto":
        return layer.form == "resident"
    if layer.stored.multiplies:
        return not layer.drops
    pays = setup.on_gpu or setup.micro_batches > 1
    return pays and layer.stored == PLAIN and layer.uses_merged_form(setup.config.tokens_per_micro_batch)
