"""Starts DeepSpeed: its settings, accelerator and process group, and the parts of it that are switched off."""

import contextlib
import gc
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import cuda_accelerator
from deepspeed.runtime import compiler

from relora_mora.config.checks.deepspeed import zero_defaults
from relora_mora.config.schema import TrainConfig
from relora_mora.distributed.join import backend_name, join
from relora_mora.system.hardware import uses_cuda


def deepspeed_settings(
    train: TrainConfig, world_size: int, *, clip: float, bf16: bool, trainable: int, on_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from our settings; ``train.deepspeed`` adds to it."""
    zero_optimization = {
        **zero_defaults(train.zero_stage, world_size, trainable, on_gpu=on_gpu),
        **train.deepspeed.get("zero_optimization", {}),
        "stage": train.zero_stage,
    }
    plain = train.zero_stage == 0 and not bf16  # DeepSpeed does not wrap our optimizer
    settings: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_clipping": 0.0 if plain else clip,  # if plain, ZeroEngine.step clips
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice at every micro-batch
        "zero_optimization": zero_optimization,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    if bf16 and train.zero_stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**train.deepspeed, **settings}


if uses_cuda():  # pynvml takes CUDA_VISIBLE_DEVICES for numbers, but it may name MIG parts; DeepSpeed works without it
    cuda_accelerator.pynvml = None


def init_distributed(timeout_seconds: float = 300.0) -> tuple[int, int]:
    """Joins the process group, for DeepSpeed as well, and returns (rank, world size).

    See :func:`relora_mora.distributed.join.join`. DeepSpeed's shared-memory collective is switched off: training does
    not use it, and it needs g++ to compile.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by deprecated names, and torch warns at every call
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    join(timeout_seconds)
    if not deepspeed.comm.is_initialized():
        with quiet():
            deepspeed.init_distributed(dist_backend=backend_name(), auto_mpi_discovery=False, verbose=False)
        _import_muon()
        # DeepSpeed collects garbage several times while it builds an engine; nothing imported so far is garbage
        gc.freeze()
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _import_muon() -> None:
    """Imports DeepSpeed's Muon, which every ZeRO engine imports, without torch's compiler.

    Nothing here trains with it: it takes the norm for ``optim.clip`` after its own update, and its momentum cannot be
    saved by elements. But its module passes functions to torch.compile, and that takes seconds to import.
    """
    compile_functions = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_functions


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what DeepSpeed prints while it is set up; its warnings still come through the logger."""
    if os.environ.get("DEEPSPEED_LOG_LEVEL"):
        yield
        return
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        yield
