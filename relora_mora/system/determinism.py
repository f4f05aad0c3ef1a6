"""The same bits from the same numbers, also on GPUs."""

from __future__ import annotations

import os

import torch
from torch._inductor import config as inductor

from relora_mora.system.hardware import uses_cuda


def compute_deterministically() -> None:
    """Has this process repeat bit for bit what it computes on GPUs; on CPUs it always does, and nothing changes.

    To be called before CUDA and NCCL begin. torch then takes the deterministic one of its kernels where it has several,
    the backward of flash attention among them, raises RuntimeError where it has none, and keeps NCCL from adding up
    inside switches (NVLS): ``torch.use_deterministic_algorithms``.
    """
    if not uses_cuda():
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it at its start; without it torch refuses products
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers tells the package flash-attn
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True)
    if hasattr(inductor, "deterministic"):  # from torch 2.10 on: its compiler then chooses nothing by a stopwatch
        inductor.deterministic = True
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads any
