"""The contenders: this trainer's methods on its own engine, and peers from the package index in plain torch loops.

Every contender trains the same model on the same random tokens, with the same loss in chunks; only ``plain`` uses
transformers' loss. The peers also train embeddings, norms and head, as pretraining with an adapter method does. For
fine-tuning only adapters train, and PEFT's model is called as its users call it, with transformers' loss.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

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

FORMS = ("merged", "resident", "decoupled")
BASES = ("int8", "fp8")
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


class Ours:
    """A method of this trainer, on DeepSpeed.

    ``options``: a value of ``method.form`` or ``method.base``, or ``compiled``. For ``frozen`` neither the decoder's
    linears nor adapters train; no adapter method can be faster.
    """

    def __init__(self, setting: Setting, name: str, *options: str) -> None:
        ranks = torch.distributed.get_world_size()
        config = ours_config(setting, "full" if name == "frozen" else name, options, ranks)
        lm = build_model(setting.model_config, seed=setting.seed)
        if config.method.uses_adapters:
            inject(lm, config.method, seed=setting.seed)
        set_trainable(lm, config.method)
        choose_forms(lm, Setup(config, setting.zero_stage, ranks, bf16=setting.bf16, on_gpu=uses_cuda()), None)
        if name == "frozen":
            for _, linear in decoder_linears(lm):
                linear.requires_grad_(False)
        self.trainable = _trainable(lm)
        self.flops = flops_per_token(setting.model_config, config)
        groups = parameter_groups(lm, config.optim)
        fixed = {name: p.data for name, p in lm.named_parameters() if not p.requires_grad}
        self.base = FrozenMasters(fixed, torch.distributed.get_rank(), ranks)
        self.base.take(fixed.__getitem__)
        self.engine = ZeroEngine(
            LossModel(lm, compiled="compiled" in options),
            lm,
            build_optimizer(lm, groups, config.optim),
            config.train,
            clip=config.optim.clip,
            bf16=setting.bf16,
        )
        self.on_host = [*self.base.weights.values()]  # tensors that are not on the device, or would not be on a GPU
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


def ours_config(setting: Setting, method: str, options: Sequence[str], world_size: int) -> Config:
    sequences = setting.tokens // setting.sequence_length
    sizes = {"batch_size": sequences * setting.accumulation * world_size, "micro_batch_size": sequences}
    precision = "bf16" if setting.bf16 else "fp32"
    text = {"train": "unused", "validation": "unused", "sequence_length": setting.sequence_length, "lanes": world_size}
    tree: dict[str, dict[str, Any]] = {
        "model": {"config": "unused", "compile": "compiled" in options},
        "tokenizer": {"path": "unused"},
        "data": text,
        "method": {"name": method},
        "train": {"run_dir": "unused", **sizes, "precision": precision, "zero_stage": setting.zero_stage},
    }
    if setting.finetune:
        tree = with_defaults(tree, {"method": FINETUNING["method"]})
    if METHODS[method].adapter is not None:
        form = next((each for each in FORMS if each in options), "auto")
        base = next((each for each in BASES if each in options), None)
        tree["method"] |= {"rank": setting.rank, "form": form, "base": base, "base_products": True}
    config = validate(tree, "the benchmark", world_size=world_size)
    check_adapters(setting.model_config, config.method)
    return config


class Plain:
    """A plain torch loop: model, loss, backward, clip, optimizer step."""

    on_host: Sequence[Tensor] = ()

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


Contender = Ours | Plain


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _adamw(lm: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    trained = [p for p in lm.parameters() if p.requires_grad]
    return lm, torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)


def _peft_lora(lm: Any, setting: Setting) -> tuple[nn.Module, torch.optim.Optimizer]:
    from peft import LoraConfig, get_peft_model

    linears = list(DECODER_LINEARS)
    lora = LoraConfig(r=setting.rank, lora_alpha=setting.rank, lora_dropout=0.0, target_modules=linears)
    model = get_peft_model(lm, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        of_linears = any(f"{kind}." in name for kind in DECODER_LINEARS)
        if "lora_" in name or not (of_linears or setting.finetune):
            parameter.requires_grad_(True)
    return _adamw(model)


PEERS: dict[str, Callable[[Setting], Contender]] = {
    "plain": lambda setting: Plain(setting, _adamw, own_loss=True),
    "peft_lora": lambda setting: Plain(setting, lambda lm: _peft_lora(lm, setting), own_loss=setting.finetune),
}


def chosen(names: list[str], world_size: int) -> list[str]:
    """Checks the names of the contenders.

    Raises :class:`ConfigError` if a name is unknown, not installed, or limited to one process.
    """
    faults = [] if names else ["--methods: got no names; give full,remora"]
    for name in names:
        method, *options = name.split("_")
        is_ours = method in (*METHODS, "frozen") and all(len({*options} & {*kind}) <= 1 for kind in (FORMS, BASES))
        with_adapter = method in METHODS and METHODS[method].adapter is not None
        known = (*FORMS, *BASES, "compiled") if with_adapter else ("compiled",)
        if name == "peft_lora" and importlib.util.find_spec("peft") is None:
            faults.append("--methods: peft_lora needs peft; pip install peft, or leave it out")
        elif world_size > 1 and name in PEERS:
            faults.append(f"--methods: {name} runs only in one process, but this job has {world_size}; leave it out")
        elif name not in PEERS and not (is_ours and {*options} <= {*known}):
            faults.append(
                f"--methods: got {name}, expected {', '.join((*PEERS, 'frozen', *METHODS))}; the last ones may end in "
                f"_compiled, and those with adapters in _{', _'.join((*FORMS, *BASES))}"
            )
    if faults:
        raise ConfigError(faults, "the command line")
    return names
