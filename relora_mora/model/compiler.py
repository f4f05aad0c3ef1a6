"""torch.compile for the decoder layers: where it is used, and what it needs."""

from __future__ import annotations

import torch
from torch import nn

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import ModelConfig
from relora_mora.system.logs import log
from relora_mora.system.process import missing_to_compile

# programs of one layer: training and evaluation, and each size of a batch have their own
RECOMPILE_LIMIT = 64


def compiles(settings: ModelConfig, zero_stage: int, *, on_gpu: bool) -> bool:
    """Whether the decoder layers are compiled: as ``model.compile`` says, with ``auto`` on CUDA on ZeRO 0 to 2."""
    return on_gpu and zero_stage < 3 if settings.compile == "auto" else settings.compile


def compiles_here(settings: ModelConfig, zero_stage: int, *, on_gpu: bool) -> bool:
    """As :func:`compiles`, but false, with a warning, where ``auto`` finds no compiler or no headers of Python.

    The compiler is one for C++ on a CPU and one for C, which Triton needs, on a GPU. Raises :class:`ConfigError` where
    ``model.compile`` is true and there is none.
    """
    if not compiles(settings, zero_stage, on_gpu=on_gpu):
        return False
    missing = missing_to_compile("C" if on_gpu else "C++")
    if missing is None:
        return True
    fault = f"model.compile: torch.compile needs more than there is here: {missing}"
    if settings.compile == "auto":
        log.warning("%s; until then the layers run uncompiled, which is slower", fault)
        return False
    raise ConfigError([f"{fault}, or leave it at auto"], "the settings")


def allow_programs(count: int) -> None:
    """Lets torch.compile make this many programs of one layer: each operator of a run has its own."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, count)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, count)


def compile_layers(layers: nn.ModuleList) -> None:
    """Has torch.compile make one program of each decoder layer, for each shape and operator at its first use."""
    allow_programs(RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(dynamic=False)
