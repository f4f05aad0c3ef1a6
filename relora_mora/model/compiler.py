"""torch.compile for the decoder layers: where it is used, and what it needs."""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor, nn

from relora_mora.config import ConfigError, ModelConfig
from relora_mora.system.logs import log

# programs of one layer: each operator of a cycle, training and evaluation, and each size of a batch have their own
RECOMPILE_LIMIT = 64


def compiles(settings: ModelConfig, zero_stage: int, *, on_cuda: bool) -> bool:
    """Whether the decoder layers are compiled: as ``model.compile`` says, with ``auto`` on CUDA on ZeRO 0 to 2."""
    return on_cuda and zero_stage < 3 if settings.compile == "auto" else settings.compile


def compiles_here(settings: ModelConfig, zero_stage: int, *, on_cuda: bool) -> bool:
    """As :func:`compiles`, but false, with a warning, where ``auto`` finds no compiler for torch.compile.

    That is one for C++ on a CPU and one for C, which Triton needs, on a GPU. Raises :class:`ConfigError` where
    ``model.compile`` is true and there is none.
    """
    if not compiles(settings, zero_stage, on_cuda=on_cuda):
        return False
    language, variable, names = ("C", "CC", ("gcc", "clang")) if on_cuda else ("C++", "CXX", ("g++", "clang++"))
    if any(map(shutil.which, (os.environ.get(variable, names[0]), names[1]))):
        return True
    missing = f"model.compile: torch.compile needs a {language} compiler here, and there is no {names[0]}"
    remedy = f"install it, or name one in {variable}"
    if settings.compile == "auto":
        log.warning("%s; the layers run uncompiled, which is slower; %s", missing, remedy)
        return False
    raise ConfigError([f"{missing}; {remedy}, or leave it at auto"], "the settings")


def compile_layers(layers: nn.ModuleList) -> None:
    """Has torch.compile make one program of each decoder layer, for each shape and operator at its first use."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(dynamic=False)


def any_number_of(values: Tensor) -> Tensor:
    """Has a compiled layer take any length of this vector, in place of a program for each."""
    torch._dynamo.mark_dynamic(values, 0)
    return values
