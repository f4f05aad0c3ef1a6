"""The contenders: this trainer's methods on its own engine, and peers from the package index in plain torch loops.

Every contender trains the same model on the same random tokens, with the same loss in chunks; only ``plain`` uses
transformers' loss. The peers also train embeddings, norms and head, as pretraining with an adapter method does. For
fine-tuning only adapters train, and PEFT's model is called as its users call it, with transformers' loss.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from launch.benchmark.released import RELEASED_TYPE, use_released_layers
from relora_mora.adapters.inject import decoder_linears, inject
from relora_mora.config.load import FINETUNING, ConfigError, validate, with_defaults
from relora_mora.config.registry import METHODS
from relora_mora.config.schema import DECODER_LINEARS, Config
from relora_mora.engine.engine import ZeroEngine
from relora_mora.engine.merging import FrozenMasters, Merger
from relora_mora.model.causal import LossModel, build_model
from relora_mora.optim.groups import build_optimizer, parameter_groups, set_trainable
from relora_mora.sizing.fit import check_adapters, choose_forms
from relora_mora.sizing.measure import flops_per_token
from relora_mora.sizing.setup import Setup
from relora_mora.system.hardware import uses_cuda

RATE = 1e-5  # small, so that the loss stays finite; a step costs the same at any rate


@dataclass(frozen=True)
class Setting:
    """The options that all contenders share. ``tokens``: tokens of a micro-batch on one rank."""

    model_config: PreTrainedConfig
    tokens: int
    sequence_length: int
    accumulation: int
    zero_stage: int
    rank: int
    square_multiple: int
    bf16: bool
    device: torch.device
    finetune: bool = False
    seed: int = 0

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches of one step: input_ids and labels [sequences, T]."""
        generator = torch.Generator().manual_seed(self.seed + int(os.environ.get("RANK", "0")))
        size = (self.tokens // self.sequence_length, self.sequence_length + 1)
        batches = []
        for _ in range(self.accumulation):
            ids = torch.randint(0, self.model_config.vocab_size, size, generator=generator).to(self.device)
            batches.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        return batches


class Contender(Protocol):
    """One method, ready to make optimizer steps."""

    model: nn.Module
    trainable: int  # number of parameters over all ranks

    def step(self) -> float:
        """Makes one optimizer step; returns the loss of its last micro-batch."""

    def parts(self) -> dict[str, list[Tensor]]:
        """The tensors that stay between steps: weights, optimizer, and ``host`` for tensors that are not on the device.

        At ZeRO stage 3 with several ranks only the weights that stay gathered are listed, without DeepSpeed's
        partitions.
        """


class Ours:
    """A method of this trainer, on DeepSpeed.

    ``form`` is a value of ``method.form``, or ``released`` (:mod:`launch.benchmark.released`). With ``frozen`` neither
    the decoder's linears nor adapters train; no adapter method can be faster.
    """

    def __init__(
        self,
        setting: Setting,
        method: str,
        form: str = "auto",
        *,
        base: str | None = None,
        compiled: bool = False,
        frozen: bool = False,
    ) -> None:
        from torch import distributed as dist

        ranks = dist.get_world_size()
        config = ours_config(setting, method, form, ranks, base=base, compiled=compiled)
        lm = build_model(setting.model_config, seed=setting.seed)
        if config.method.uses_adapters:
            inject(lm, config.method, seed=setting.seed)
        if form == "released":
            use_released_layers(lm)
        set_trainable(lm, config.method)
        choose_forms(lm, Setup(config, setting.zero_stage, ranks, bf16=setting.bf16, on_gpu=uses_cuda()), None)
        if frozen:
            for _, linear in decoder_linears(lm):
                linear.requires_grad_(False)
        self.trainable = _trainable(lm)
        self.flops = flops_per_token(setting.model_config, config).total
        groups = parameter_groups(lm, config.optim)
        fixed = {name: p.data for name, p in lm.named_parameters() if not p.requires_grad}
        self.base = FrozenMasters(fixed, dist.get_rank(), ranks)
        self.base.take(fixed.__getitem__)
        self.engine = ZeroEngine(
            LossModel(lm, compiled=compiled),
            lm,
            build_optimizer(lm, groups, config.optim),
            config.train,
            clip=config.optim.clip,
            bf16=setting.bf16,
        )
        self.model: nn.Module = lm
        self.merger = Merger(self.engine, self.base, config.method, seed=config.train.seed)
        self.config = config
        self.batches = setting.batches()
        self.rates = [RATE] * len(groups)

    def step(self) -> float:
        self.engine.train()
        loss = torch.zeros(())
        for index, (ids, labels) in enumerate(self.batches):
            loss = self.engine(ids, labels)
            self.engine.accumulate(loss, last=index == len(self.batches) - 1)
        return self.engine.step(self.rates, loss.detach()).loss

    def parts(self) -> dict[str, list[Tensor]]:
        states = [value for flat in self.engine.flats() for value in self.engine.state_of(flat).values()]
        return {
            "weights": [p.data for p in self.model.parameters()],
            "optimizer": [*self.engine.flats(), *states],
            "host": list(self.base.weights.values()),
        }


def ours_config(
    setting: Setting, method: str, form: str, world_size: int, *, base: str | None = None, compiled: bool = False
) -> Config:
    sequences = setting.tokens // setting.sequence_length
    batch = sequences * setting.accumulation * world_size
    tree: dict[str, dict[str, Any]] = {
        "model": {"config": "unused", "compile": compiled},
        "tokenizer": {"path": "unused"},
        "data": {
            "train": "unused",
            "validation": "unused",
            "sequence_length": setting.sequence_length,
            "lanes": world_size,
        },
        "method": {"name": method},
        "train": {
            "run_dir": "unused",
            "batch_size": batch,
            "micro_batch_size": sequences,
            "precision": "bf16" if setting.bf16 else "fp32",
            "zero_stage": setting.zero_stage,
        },
    }
    if setting.finetune:
        tree = with_defaults(tree, {"method": FINETUNING["method"]})
    if METHODS[method].adapter is not None:
        tree["method"] |= {"rank": setting.rank, "form": "decoupled" if form == "released" else form}
        tree["method"] |= {"base": base, "base_products": True}
    if form == "released":
        tree["method"]["operators"] = [RELEASED_TYPE]  # only one, because the steps between merges are measured
    if "method.square_multiple" in METHODS[method].settings and not setting.finetune:
        tree["method"]["square_multiple"] = setting.square_multiple
    config = validate(tree, "the benchmark", world_size=world_size)
    check_adapters(setting.model_config, config.method)
    return config


class Plain:
    """A plain torch loop: model, loss, backward, clip, optimizer step."""

    def __init__(
        self, setting: Setting, prepare: Callable[[Any], tuple[Any, torch.optim.Optimizer]], *, own_loss: bool = False
    ) -> None:
        dtype = torch.bfloat16 if setting.bf16 else torch.float32
        lm: Any = build_model(setting.model_config, seed=setting.seed)
        lm = lm.to(device=setting.device, dtype=dtype)
        self.model, self.optimizer = prepare(lm)
        self.trainable = _trainable(self.model)
        self.loss = None if own_loss else LossModel(lm)
        self.batches = setting.batches()
        self.accumulation = setting.accumulation

    def step(self) -> float:
        self.model.train()
        loss = torch.zeros(())
        for ids, labels in self.batches:
            if self.loss is None:
                loss = self.model(input_ids=ids, labels=labels, shift_labels=labels).loss / self.accumulation
            else:
                loss = self.loss(ids, labels) / self.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()) * self.accumulation

    def parts(self) -> dict[str, list[Tensor]]:
        states = [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        return {"weights": [p.data for p in self.model.parameters()], "optimizer": states}


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _adamw(lm: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    trained = [p for p in lm.parameters() if p.requires_grad]
    return lm, torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)


def _peft_lora(setting: Setting) -> Contender:
    from peft import LoraConfig, get_peft_model

    def prepare(lm: Any) -> tuple[Any, torch.optim.Optimizer]:
        model = get_peft_model(
            lm,
            LoraConfig(r=setting.rank, lora_alpha=setting.rank, lora_dropout=0.0, target_modules=list(DECODER_LINEARS)),
            autocast_adapter_dtype=False,
        )
        for name, parameter in model.named_parameters():
            of_linears = any(f"{kind}." in name for kind in DECODER_LINEARS)
            if "lora_" in name or not (of_linears or setting.finetune):
                parameter.requires_grad_(True)
        return _adamw(model)

    return Plain(setting, prepare, own_loss=setting.finetune)


OURS: dict[str, Callable[[Setting], Contender]] = {
    **{name: functools.partial(Ours, method=name) for name in METHODS},
    "frozen": lambda setting: Ours(setting, "full", frozen=True),
    "relora_merged": lambda setting: Ours(setting, "relora", "merged"),
    "relora_resident": lambda setting: Ours(setting, "relora", "resident"),
    "remora_merged": lambda setting: Ours(setting, "remora", "merged"),
    "remora_resident": lambda setting: Ours(setting, "remora", "resident"),
    "remora_decoupled": lambda setting: Ours(setting, "remora", "decoupled"),
    "remora_released": lambda setting: Ours(setting, "mora", "released"),
    "remora_r32": lambda setting: Ours(replace(setting, square_multiple=32), "remora"),
    "remora_int8": lambda setting: Ours(setting, "remora", base="int8"),
    "remora_int8_decoupled": lambda setting: Ours(setting, "remora", "decoupled", base="int8"),
    "relora_int8": lambda setting: Ours(setting, "relora", base="int8"),
    "full_compiled": lambda setting: Ours(setting, "full", compiled=True),
    "remora_compiled": lambda setting: Ours(setting, "remora", compiled=True),
    "remora_int8_compiled": lambda setting: Ours(setting, "remora", base="int8", compiled=True),
    "remora_fp8_compiled": lambda setting: Ours(setting, "remora", base="fp8", compiled=True),
}
PEERS: dict[str, Callable[[Setting], Contender]] = {
    "plain": lambda setting: Plain(setting, _adamw, own_loss=True),
    "peft_lora": _peft_lora,
}
CONTENDERS = OURS | PEERS


def chosen(names: list[str], world_size: int) -> list[str]:
    """Checks the names of the contenders.

    Raises :class:`ConfigError` if a name is unknown, not installed, or limited to one process.
    """
    faults = []
    for name in names:
        if name not in CONTENDERS:
            faults.append(f"--methods: unknown method {name}; choose from {', '.join(CONTENDERS)}")
        elif name == "peft_lora" and importlib.util.find_spec("peft") is None:
            faults.append("--methods: peft_lora needs peft; pip install peft, or leave it out")
        elif world_size > 1 and name in PEERS:
            faults.append(f"--methods: {name} runs only in one process, but this job has {world_size}; leave it out")
    if not names:
        faults.append(f"--methods: got no names; choose from {', '.join(CONTENDERS)}")
    if faults:
        raise ConfigError(faults, "the command line")
    return names
