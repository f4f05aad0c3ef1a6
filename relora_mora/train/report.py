"""What a run reports: numbers gathered over an interval of steps, and the metrics made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from relora_mora.config import Config
from relora_mora.data import SKIP_REASONS
from relora_mora.distributed.collectives import sum_over_hosts
from relora_mora.merging import MergeRecord
from relora_mora.system.hardware import peak_flops
from relora_mora.system.logs import log

_COUNTED = ("documents", "bad", "retries", *(f"skipped/{kind}" for kind in SKIP_REASONS))


class Interval:
    """What has been counted since the last line of metrics."""

    def __init__(self, device: torch.device, before: Mapping[str, Any] | None = None) -> None:
        """``before`` is the :meth:`state` of a run that was stopped between two lines."""
        self.loss = torch.zeros(
            (), dtype=torch.float64, device=device
        )  # of this rank, summed over the steps that were made
        self.good_steps, self.grad_norm = 0, 0.0
        self.steps, self.seconds, self.data_seconds = 0, 0.0, 0.0  # of this process, skipped ones too
        if before is not None:
            self.loss += before["loss"]
            self.good_steps, self.grad_norm = before["good_steps"], before["grad_norm"]

    def state(self, world_size: int) -> dict[str, Any]:
        """For any number of ranks; a collective."""
        [loss] = sum_over_hosts([float(self.loss)])
        return {"loss": loss / world_size, "good_steps": self.good_steps, "grad_norm": self.grad_norm}

    def speed(self, *, tokens_per_step: int, flops_per_token: float, world_size: int, peak: float) -> dict[str, float]:
        """``peak`` is that of one device, in FLOP/s."""
        elapsed = self.seconds + self.data_seconds
        tokens_per_second = self.steps * tokens_per_step / elapsed
        achieved = tokens_per_second * flops_per_token / world_size
        return {
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": elapsed / self.steps,
            "perf/data_wait_seconds": self.data_seconds / self.steps,
            "perf/tflops_per_device": achieved / 1e12,
            "perf/mfu": achieved / peak,
        }


def peak_of_device(config: Config, *, bf16: bool) -> float:
    """FLOP/s of one device: a setting, known or measured."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    peak, source = peak_flops(bf16=bf16)
    log.info("peak of one device: %.3g TFLOP/s (%s)", peak / 1e12, source)
    return peak


def loss_metrics(loss: float) -> dict[str, float]:
    return {"train/loss": loss, "train/perplexity": math.exp(min(loss, 700.0))}


def data_metrics(counts: Mapping[str, int]) -> dict[str, int]:
    """What all ranks have read; a collective. ``retries`` counts since this process started, the rest since step 0."""
    totals = dict(
        zip(_COUNTED, map(int, sum_over_hosts([float(counts.get(name, 0)) for name in _COUNTED])), strict=True)
    )
    skipped = {
        f"perf/data_skipped/{kind}": totals[f"skipped/{kind}"] for kind in SKIP_REASONS if totals[f"skipped/{kind}"]
    }
    return {
        "train/epoch": counts["epoch"],
        "train/documents": totals["documents"],
        "perf/data_bad_lines": totals["bad"],
        "perf/data_retries": totals["retries"],
        **skipped,
    }


def merge_metrics(record: MergeRecord) -> dict[str, Any]:
    """A merge record as metrics: ``merge/delta_norm/q_proj`` and so on."""
    values: dict[str, Any] = {
        "merge/layers": record.layers,
        "merge/zeroed_elements": record.zeroed,
        "merge/seconds": record.seconds,
        "merge/operator_before": record.operator_before,
        "merge/operator_after": record.operator_after,
    }
    values |= {f"merge/delta_norm/{kind}": value for kind, value in record.delta_norm.items()}
    values |= {f"merge/effective_rank/{kind}": value for kind, value in record.effective_rank.items()}
    return {key: value for key, value in values.items() if value is not None}
