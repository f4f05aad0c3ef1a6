"""Builds the parts of a run in the order of their dependencies, with their initial values."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers
from relora_mora.adapters.mora import operator_in_use, set_operators
from relora_mora.config.checks.combinations import remarks
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config
from relora_mora.data.stream.packing import document_boundaries
from relora_mora.distributed.collectives import from_first_rank
from relora_mora.engine.engine import ZeroEngine
from relora_mora.engine.merging import FrozenMasters, Merger
from relora_mora.kernels import ops
from relora_mora.model.causal import LossModel, empty_model, ends_of, head_scale, initial_values, put_values
from relora_mora.model.compiling import allow_programs
from relora_mora.model.config import function_differences
from relora_mora.model.loss import bytes_per_logit
from relora_mora.optim.groups import (
    ParameterGroup,
    adapted_share,
    build_optimizer,
    count_parameters,
    expert_parameters,
    keep_old_rows,
    make_schedule,
    parameter_groups,
    set_trainable,
)
from relora_mora.schedule import Schedule
from relora_mora.sizing.fit import choose_forms, uneven_widths
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.logs import counted, log, shared_log
from relora_mora.train.begin.inputs import Inputs
from relora_mora.weights.foreign import abbreviate
from relora_mora.weights.load import start_config, start_weights
from relora_mora.weights.peft import AdapterFolder
from relora_mora.weights.vocabulary import add_rows


@dataclass(frozen=True)
class Run:
    """The parts of a run. Its progress is in a :class:`RunState`."""

    inputs: Inputs
    engine: ZeroEngine
    base: FrozenMasters
    merger: Merger
    groups: list[ParameterGroup]
    schedule: Schedule

    @property
    def config(self) -> Config:
        return self.inputs.config


def build(inputs: Inputs, rank: int) -> Run:
    """A run at its start; a collective.

    If it resumes, no value is drawn or read, since all values will come from the checkpoint.
    """
    config = inputs.config
    setup = inputs.setup
    resumes = inputs.checkpoint is not None
    lm = empty_model(inputs.model_config, attention=config.model.attention)
    if config.model.activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.method.uses_adapters:
        with torch.device("meta") if resumes else contextlib.nullcontext():
            inject(lm, config.method, seed=config.train.seed)
    set_trainable(lm, config.method)
    choose_forms(lm, setup, inputs.memory)  # all ranks choose the same forms
    _describe(lm, inputs)
    groups = parameter_groups(lm, config.optim, keeps_rows=config.method.trains_rows)
    frozen = [name for name, p in lm.named_parameters() if not p.requires_grad]
    base = FrozenMasters(frozen, rank, setup.world_size)
    # drawn and read while shapes are known: with ZeRO-3, parameters have no shape later
    creator, values = ({}, {}) if resumes else start_values(lm, base, config, setup.world_size)
    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    # zeros use no memory until they are written to; DeepSpeed places, casts and partitions them
    put_values(lm, {name: torch.zeros(p.shape, dtype=dtype) for name, p in lm.named_parameters() if p.is_meta})
    if config.method.trains_rows:
        keep_old_rows(lm, int(config.method.train_embeddings))
    for _, layer in adapter_layers(lm):
        layer.pack(empty=True)
    module = LossModel(lm, compiled=setup.compiles, passes_boundaries=inputs.passes_boundaries)
    optimizer = build_optimizer(lm, groups, config.optim)
    engine = ZeroEngine(module, lm, optimizer, config.train, clip=config.optim.clip, bf16=setup.bf16)
    if not resumes:
        write_initial_values(engine, base, creator, values)
    merger = Merger(engine, base, config.method, seed=config.train.seed)
    schedule = make_schedule(config.method, config.optim, config.train.steps)
    return Run(inputs, engine, base, merger, groups, schedule)


def _describe(lm: PreTrainedModel, inputs: Inputs) -> None:
    """Logs what trains, and how the layers compute."""
    method = inputs.config.method
    layers = [layer for _, layer in adapter_layers(lm)]
    if layers:
        used = ops.describe("cuda" if inputs.setup.on_gpu else "cpu")
        stored = f"; weights in {method.eight_bits}" if method.eight_bits else ""
        resident = "; W + delta is resident" if any(layer.resident for layer in layers) else ""
        share = f"{adapted_share(lm):.0%} of the matrices in layers"
        log.info("%s adapters on %d linears, %s; %s%s%s", method.name, len(layers), share, used, stored, resident)
        if expert_parameters(lm):
            how = "train at full rank" if method.train_experts else "are frozen"
            log.info("experts and routers have no adapters, and %s", how)
    can_be_cut, _ = head_scale(lm)
    if not can_be_cut:
        elements = inputs.config.tokens_per_micro_batch * len(lm.get_output_embeddings().weight)
        size = elements * 2 * bytes_per_logit(torch.bfloat16 if inputs.setup.bf16 else torch.float32, in_place=False)
        log.info("model: its loss needs all logits of a micro-batch at once, %.1f GiB with gradients", size / 2**30)
    for remark in remarks(inputs.config):
        shared_log.warning(remark)
    for note in uneven_widths(inputs.model_config) if inputs.setup.on_gpu else ():
        shared_log.warning("model: %s", note)
    counts = count_parameters(lm)
    numbers = (f"{counts.total:,}", f"{counts.trainable:,}", f"{counts.adapters:,}")
    log.info("parameters: %s total, %s trainable, %s adapters", *numbers)


def start_values(
    lm: PreTrainedModel, base: FrozenMasters, config: Config, world_size: int
) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """The rank that creates each parameter of the plain model, and the float32 values that this rank has created.

    A collective. Each rank draws its part of the random values at the same time as the others. The first rank reads
    ``model.init_from`` and ``model.adapter``; the values of an adapter replace those that its layers were drawn with.
    """
    shapes = {name: p.shape for name, p in lm.named_parameters() if p.is_meta}
    if config.model.init_from is not None:
        values: dict[str, torch.Tensor] = {}

        def read() -> list[str]:
            values.update(_foreign_weights(config, lm, shapes))
            return list(values)

        return dict.fromkeys(from_first_rank(read), 0), values
    creator = dict(base.owner)
    load = [0] * world_size
    frozen_first = sorted(shapes.items(), key=lambda item: item[0] not in base.owner)
    for name, shape in frozen_first:  # a trainable one goes to the rank with the least to do
        load[creator.setdefault(name, load.index(min(load)))] += shape.numel()
    plain = empty_model(lm.config)
    return creator, initial_values(plain, [name for name in shapes if creator[name] == base.rank], config.train.seed)


def write_initial_values(
    engine: ZeroEngine, base: FrozenMasters, creator: Mapping[str, int], values: dict[str, torch.Tensor]
) -> None:
    """Distributes the initial values, one parameter at a time; a collective.

    A frozen parameter goes to the base of its owner, and from there to all ranks in their compute precision. Of a
    trainable parameter, each rank takes its own partition of the float32 master.
    """
    for name, rank in creator.items():
        owner = base.owner.get(name)
        value = values.pop(name, None)
        if engine.world_size > 1 and owner != rank:
            sent = torch.empty(engine.shapes[name], dtype=torch.float32, device=engine.device)
            if value is not None:
                sent.copy_(value)
            engine.broadcast(sent, rank)
            value = sent
        if owner is None:
            assert value is not None
            engine.scatter(name, value)
        elif owner == engine.rank:
            assert value is not None
            base.put(name, value)
    base.push(engine)
    engine.refresh()


def _foreign_weights(config: Config, lm: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The float32 weights of ``model.init_from``, with ``model.adapter``, by the names of this run's parameters.

    Raises :class:`ConfigError` if they do not fit, or if they compute something else in the model they come from.
    """
    path = Path(str(config.model.init_from))
    faults = [
        f"model.init_from: {key} is {there!r} in that model and {here!r} in model.config; "
        f"set model.overrides.{key}, or omit model.config and model.overrides"
        for key, there, here in function_differences(start_config(path), lm.config)
        if key != "vocab_size" or config.model.new_tokens is None
    ]
    if faults:
        raise ConfigError(faults, str(path))
    weights = start_weights(path)
    embedding, head = ends_of(lm)
    if lm.config.tie_word_embeddings and not torch.equal(weights[embedding], weights.get(head, weights[embedding])):
        fault = (
            "model.init_from: its config ties the output head to the embeddings, but its files hold a different head; "
            "set tie_word_embeddings to false in its config.json and in model.overrides"
        )
        raise ConfigError([fault], str(path))
    add_rows(weights, lm, config)
    broken = [name for name in shapes if not weights[name].isfinite().all()]
    if broken:
        fault = f"model.init_from: numbers that are not finite in {abbreviate(broken)}; use undamaged weights"
        raise ConfigError([fault], str(path))
    weights = {name: weights[name] for name in shapes}
    if config.model.adapter is not None:
        adapter = AdapterFolder(Path(config.model.adapter))
        adapter.check_base(weights.get, str(path))
        weights |= {name: adapter.value(name) for name in adapter.shapes}
    return weights


def warm_up(run: Run, step: int, guard: Guard) -> None:
    """Compiles the layers for all steps after this one, if they are under torch.compile.

    Runs one micro-batch of each kind of training and evaluation with each remaining operator, on this rank. The state
    of the run does not change.
    """
    if not run.inputs.setup.compiles:
        return
    config = run.config
    train_size = config.train.micro_batch_size
    eval_size = config.eval.micro_batch_size or train_size
    masks = config.data.masks_documents_of
    # (training, sequences, whether documents are masked) of every kind of batch in this run
    batches = {(True, train_size, masks([source])) for source in config.data.train}
    batches |= {(False, eval_size, masks(sources)) for sources in config.data.validation.values()}
    module = run.engine.module
    lm = run.engine.lm
    before = operator_in_use(lm)
    left = run.schedule.operators_left(step)
    allow_programs(len(batches) * len(left))
    if len(left) > 1:
        log.info("compiling the decoder layers for %d operators", len(left))
    for operator in left:
        set_operators(lm, operator)
        for training, size, masked in sorted(batches, reverse=True):
            guard.begin("compiling the decoder layers", within=LONG_SECONDS)
            ids = torch.zeros(size, config.data.sequence_length, dtype=torch.int64, device=run.engine.device)
            boundaries = document_boundaries(ids.cpu()).to(ids.device) if masked else None
            run.engine.keep_merged()
            module.train(training)
            with torch.set_grad_enabled(training):
                loss = module(ids, ids, boundaries, float(ids.numel()))
            if training:  # autograd.grad discards the gradients without triggering ZeRO's hooks
                torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    set_operators(lm, before)


def described(run: Run, step: int) -> str:
    """Describes the run, its device and its batch in one line."""
    config = run.config
    engine = run.engine
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    precision = "bf16" if engine.bf16 else "fp32"
    ranks = counted(engine.world_size, "rank")
    batch = counted(config.train.batch_size, "sequence")
    return (
        f"{config.method.name} on {ranks} ({device}), ZeRO-{engine.stage}, {precision}; a step has {batch} of "
        f"{config.data.sequence_length} tokens, {config.accumulation_steps(engine.world_size)} x "
        f"{config.train.micro_batch_size} on each rank; "
        f"step {step} of {config.train.steps}; run folder {config.train.run_dir}"
    )
