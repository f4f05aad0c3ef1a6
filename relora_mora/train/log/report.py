"""Counts over an interval of steps, and the metrics computed from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relora_mora.config.schema import LogConfig
from relora_mora.data.errors import SKIP_REASONS
from relora_mora.distributed.collectives import least_over_hosts, sum_over_hosts
from relora_mora.engine.merging import MergeRecord
from relora_mora.evaluation.generation import Generated
from relora_mora.evaluation.loss import EvalResult
from relora_mora.system.hardware import peak_flops
from relora_mora.system.logs import log

Write = Callable[[int, Mapping[str, Any]], None]  # (step, its metrics); does nothing on ranks other than the first

_COUNTED = ("documents", "bad", "retries", *(f"skipped/{reason}" for reason in SKIP_REASONS))


@dataclass
class Interval:
    """Counts since the last line of metrics."""

    loss: float = 0.0  # float64, of this rank; summed over the steps that were applied
    good_steps: int = 0
    grad_norm: float = 0.0
    # only of this process, including skipped steps
    steps: int = 0
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    data_counts: dict[str, int] = field(default_factory=dict)  # read so far by this rank

    def dump(self, world_size: int) -> dict[str, Any]:
        """The part that a checkpoint keeps, independent of the number of ranks; a collective."""
        [loss] = sum_over_hosts([self.loss])
        return {"loss": loss / world_size, "good_steps": self.good_steps, "grad_norm": self.grad_norm}


def peak_of_device(config: LogConfig, *, bf16: bool) -> float:
    """FLOP/s of one device: from the settings, known, or measured."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    peak, source = peak_flops(bf16=bf16)
    log.info("peak of one device: %.3g TFLOP/s (%s)", peak / 1e12, source)
    return peak


def loss_metrics(loss: float) -> dict[str, float]:
    return {"train/loss": loss, "train/perplexity": math.exp(min(loss, 700.0))}


def data_metrics(counts: Mapping[str, int], sources: Sequence[str], sequence_length: int) -> dict[str, int]:
    """What all ranks have read in total and from each source of a mixture; a collective.

    ``retries`` counts since the start of this process, everything else since step 0.
    """
    counted = [*_COUNTED, *(f"blocks/{source}" for source in sources)]
    sums = sum_over_hosts([float(counts.get(name, 0)) for name in counted])
    totals = dict(zip(counted, map(int, sums), strict=True))
    names = ["epoch", *(f"epoch/{source}" for source in sources)]
    epoch, *epochs = map(int, least_over_hosts([float(counts[name]) for name in names]))  # of the slowest lane
    skipped = {
        f"perf/data_skipped/{reason}": totals[f"skipped/{reason}"]
        for reason in SKIP_REASONS
        if totals[f"skipped/{reason}"]
    }
    return {
        "train/epoch": epoch,
        "train/documents": totals["documents"],
        **{f"train/tokens/{source}": totals[f"blocks/{source}"] * sequence_length for source in sources},
        **{f"train/epoch/{source}": passes for source, passes in zip(sources, epochs, strict=True)},
        "perf/data_bad_lines": totals["bad"],
        "perf/data_retries": totals["retries"],
        **skipped,
    }


def eval_metrics(results: Mapping[str, EvalResult | Generated]) -> dict[str, float | int | str]:
    """``eval/<name>/loss`` and so on for each set; ``eval/loss`` for the name ""."""
    return {
        f"eval/{name}/{key}" if name else f"eval/{key}": value
        for name, result in results.items()
        for key, value in result.as_dict().items()
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
