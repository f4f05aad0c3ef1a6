"""The results as a table for people and as an object for programs."""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

import torch

from relora_mora.benchmark.contenders import Setting
from relora_mora.benchmark.measure import Result
from relora_mora.hardware import peak_flops

MIB = 2**20
COPY_BYTES = 256 * MIB


def limits(setting: Setting) -> dict[str, float]:
    """What this machine can do at most on one rank: matrix products in TFLOP/s, copies in GB/s (bytes read and written)."""
    peak, _ = peak_flops(bf16=setting.bf16)
    source = torch.ones(COPY_BYTES // 4, device=setting.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        target.copy_(source)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"matrix_product_tflops": peak / 1e12, "copy_gb_per_second": 2 * COPY_BYTES / statistics.median(seconds[1:]) / 1e9}


def as_json(results: list[Result], setting: Setting, world_size: int, machine: dict[str, float], command: list[str]) -> dict[str, Any]:
    first = results[0]
    tokens = setting.tokens * setting.accumulation * world_size
    return {
        "command": command,
        "device": torch.cuda.get_device_name() if setting.device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "precision": "bf16" if setting.bf16 else "fp32",
        "torch": torch.__version__,
        "limits": machine,
        "methods": {
            result.name: {
                "step_seconds": result.median,
                "spread": result.spread,
                "tokens_per_second": tokens / result.median,
                "ratio": result.median / first.median,
                "utilisation": result.flops_per_step / result.median / (machine["matrix_product_tflops"] * 1e12) or None,
                "bytes_held": result.bytes_held,
                "bytes_kept_for_backward": result.bytes_kept_for_backward,
                "bytes_communicated": result.bytes_communicated,
                "merge_seconds": result.merge_seconds,
                "loss": result.loss,
            }
            for result in results
        },
    }


def table(results: list[Result], setting: Setting, world_size: int, machine: dict[str, float]) -> str:
    """One line per method; ratios refer to the first."""
    first = results[0]
    head = (
        f"{setting.model_config.num_hidden_layers} layers, hidden {setting.model_config.hidden_size}, vocabulary "
        f"{setting.model_config.vocab_size}; {setting.tokens} tokens x {setting.accumulation} x {world_size} ranks, "
        f"{'bf16' if setting.bf16 else 'fp32'}, ZeRO-{setting.zero_stage}, r = {setting.rank}; {setting.device.type}, "
        f"{torch.get_num_threads()} threads a rank: {machine['matrix_product_tflops']:.2f} TFLOP/s, "
        f"copy {machine['copy_gb_per_second']:.1f} GB/s"
    )
    columns = (
        f"{'method':18}{'step s':>9}{'+-':>6}{'ratio':>7}{'tok/s':>9}{'use':>6}{'state MiB':>11}{'ratio':>7}{'kept MiB':>10}{'ratio':>7}"
    )
    columns += f"{'sent MiB':>10}{'ratio':>7}{'merge':>7}"
    lines = [head, columns]
    for result in results:
        use = result.flops_per_step / result.median / (machine["matrix_product_tflops"] * 1e12)
        merge = f"{result.merge_seconds / result.median:.2f}x" if result.merge_seconds is not None else ""
        lines.append(
            f"{result.name:18}{result.median:9.3f}{result.spread:6.1%}{result.median / first.median:7.3f}"
            f"{setting.tokens * setting.accumulation * world_size / result.median:9,.0f}{f'{use:.0%}' if use else '':>6}"
            f"{_device_bytes(result) / MIB:11,.0f}{_device_bytes(result) / _device_bytes(first):7.3f}"
            f"{result.bytes_kept_for_backward / MIB:10,.0f}{_ratio(result.bytes_kept_for_backward, first.bytes_kept_for_backward):>7}"
            f"{result.bytes_communicated / MIB:10,.1f}{_ratio(result.bytes_communicated, first.bytes_communicated):>7}{merge:>7}"
        )
    return "\n".join(lines)


def _device_bytes(result: Result) -> int:
    return sum(size for part, size in result.bytes_held.items() if part != "host")


def _ratio(value: float, reference: float) -> str:
    return f"{value / reference:.3f}" if reference else ""
