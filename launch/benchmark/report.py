"""Formats the results as tables for people and as a JSON object for programs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from launch.benchmark.byte_tracker import PARTS
from launch.benchmark.contenders import Setting
from launch.benchmark.device import seconds_of
from launch.benchmark.measure import Result
from launch.benchmark.turns import medians, take_turns
from relora_mora.system.hardware import device_name, peak_flops

MIB = 2**20
COPY_BYTES = 256 * MIB


def limits(setting: Setting) -> dict[str, float]:
    """The peak rates of this machine on one rank: matrix products in TFLOP/s, copies in GB/s (read and written)."""
    peak, _ = peak_flops(bf16=setting.bf16)
    source = torch.ones(COPY_BYTES // 4, device=setting.device)
    target = torch.empty_like(source)
    copy = partial(seconds_of, partial(target.copy_, source), setting.device)
    seconds = medians(list(take_turns({"copy": copy}, rounds=5, warmup=1)))["copy"]
    return {"matrix_product_tflops": peak / 1e12, "copy_gb_per_second": 2 * COPY_BYTES / seconds / 1e9}


def as_json(
    results: list[Result], setting: Setting, world_size: int, machine: dict[str, float], command: list[str]
) -> dict[str, Any]:
    """All measurements; each ``..._ratio`` is relative to the first method."""
    return {
        "command": command,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "precision": "bf16" if setting.bf16 else "fp32",
        "torch": torch.__version__,
        "limits": machine,
        "methods": {
            result.name: _fields(result, results[0], setting, world_size, machine["matrix_product_tflops"])
            for result in results
        },
    }


def _fields(result: Result, first: Result, setting: Setting, world_size: int, peak_tflops: float) -> dict[str, Any]:
    return {
        "step_seconds": result.seconds,
        "spread": result.spread,
        "processor_seconds": result.processor_seconds,
        "page_faults": result.page_faults,
        "tokens_per_second": _tokens_per_second(result, setting, world_size),
        "ratio": result.seconds / first.seconds,
        "utilization": _utilization(result, peak_tflops) or None,
        "trainable_parameters": result.trainable,
        "trainable_ratio": _ratio(result.trainable, first.trainable),
        "bytes_held": result.bytes_held,
        "bytes_held_ratio": _ratio(result.held, first.held),
        "bytes_at_peak": result.bytes_at_peak,
        "bytes_at_peak_ratio": _ratio(result.peak, first.peak),
        "bytes_kept_for_backward": result.bytes_kept,
        "bytes_kept_for_backward_ratio": _ratio(result.bytes_kept, first.bytes_kept),
        "bytes_kept_by_one_layer": result.bytes_kept_by_layer,
        "bytes_kept_by_one_layer_ratio": _ratio(result.bytes_kept_by_layer, first.bytes_kept_by_layer),
        "bytes_kept_by_its_linears": result.bytes_kept_by_linears,
        "bytes_kept_by_its_linears_ratio": _ratio(result.bytes_kept_by_linears, first.bytes_kept_by_linears),
        "bytes_sent": result.bytes_sent,
        "bytes_sent_ratio": _ratio(result.sent, first.sent),
        "merge_seconds": result.merge_seconds,
        "loss": result.loss,
    }


def tables(results: list[Result], setting: Setting, world_size: int, machine: dict[str, float]) -> str:
    """Tables of time, memory and traffic, a line per method; ratios are relative to the first. MiB are per rank."""
    head = (
        f"{setting.model_config.num_hidden_layers} layers, hidden {setting.model_config.hidden_size}, vocabulary "
        f"{setting.model_config.vocab_size}; {setting.tokens} tokens x {setting.accumulation} x {world_size} ranks, "
        f"{'bf16' if setting.bf16 else 'fp32'}, ZeRO-{setting.zero_stage}, r = {setting.rank}; "
        f"{device_name()}, {torch.get_num_threads()} threads a rank: "
        f"{machine['matrix_product_tflops']:.2f} TFLOP/s, copy {machine['copy_gb_per_second']:.1f} GB/s"
    )
    times = _times(results, setting, world_size, machine["matrix_product_tflops"])
    return "\n".join([head, *times, "", *_memory(results), "", *_traffic(results)])


def _times(results: list[Result], setting: Setting, world_size: int, peak_tflops: float) -> Iterator[str]:
    yield (
        f"{'method':18}{'step s':>9}{'+-':>7}{'ratio':>7}{'cpu s':>9}{'faults':>9}{'tok/s':>9}{'use':>6}{'merge':>7}"
    )
    for result in results:
        use = _utilization(result, peak_tflops)
        used = f"{use:.0%}" if use else ""
        merge = f"{result.merge_seconds / result.seconds:.2f}x" if result.merge_seconds is not None else ""
        yield (
            f"{result.name:18}{result.seconds:9.3f}{result.spread:7.1%}{_column(result.seconds, results[0].seconds)}"
            f"{result.processor_seconds:9.2f}{result.page_faults:9,.0f}"
            f"{_tokens_per_second(result, setting, world_size):9,.0f}{used:>6}{merge:>7}"
        )


def _memory(results: list[Result]) -> Iterator[str]:
    first = results[0]
    yield "MiB between steps, and at the peak of a step, by part"
    yield f"{'method':18}{'state':>9}{'ratio':>7}{'host':>9} |{'peak':>9}{'ratio':>7} =" + "".join(
        f"{part:>13}" for part in PARTS
    )
    for result in results:
        yield (
            f"{result.name:18}{_mib(result.held):>9}{_column(result.held, first.held)}"
            f"{_mib(result.bytes_held.get('host', 0)):>9} |"
            f"{_mib(result.peak):>9}{_column(result.peak, first.peak)}  "
            + "".join(f"{_mib(result.bytes_at_peak[part]):>13}" for part in PARTS)
        )


def _traffic(results: list[Result]) -> Iterator[str]:
    first = results[0]
    yield (
        "MiB kept for backward by the seven linears of a decoder layer, by the whole layer, by the model; "
        "trained parameters; MiB passed to collectives"
    )
    yield (
        f"{'method':18}{'linears':>9}{'ratio':>7}{'layer':>9}{'ratio':>7}{'model':>9}{'ratio':>7} |"
        f"{'trains':>14}{'ratio':>7} |{'sent':>9}{'ratio':>7}"
    )
    for result in results:
        yield (
            f"{result.name:18}{_mib(result.bytes_kept_by_linears):>9}"
            f"{_column(result.bytes_kept_by_linears, first.bytes_kept_by_linears)}"
            f"{_mib(result.bytes_kept_by_layer):>9}{_column(result.bytes_kept_by_layer, first.bytes_kept_by_layer)}"
            f"{_mib(result.bytes_kept):>9}{_column(result.bytes_kept, first.bytes_kept)} |"
            f"{result.trainable:14,}{_column(result.trainable, first.trainable)} |"
            f"{_mib(result.sent):>9}{_column(result.sent, first.sent)}"
        )


def _tokens_per_second(result: Result, setting: Setting, world_size: int) -> float:
    return setting.tokens * setting.accumulation * world_size / result.seconds


def _utilization(result: Result, peak_tflops: float) -> float:
    """The method's arithmetic as a share of the machine's peak; 0 if the arithmetic is unknown."""
    return result.flops_per_step / result.seconds / (peak_tflops * 1e12)


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f}"


def _ratio(value: float, reference: float) -> float | None:

    return value / reference if reference else None


def _column(value: float, reference: float) -> str:
    return f"{value / reference:7.3f}" if reference else f"{'':7}"
