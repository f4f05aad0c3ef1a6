"""Launches, bytes and memory of head and loss on CUDA, forward and backward, counted on fake tensors.

Prints the table that ``loss.csv`` holds: ``make count-fakecuda COUNT=loss``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from relora_mora.config.schema import ModelConfig
from relora_mora.model.config import read_model_config
from relora_mora.model.loss import chunked_cross_entropy
from tests.fakecuda.layers import LENGTH, MODELS, SEQUENCES, as_csv
from tests.fakecuda.watch import Watch
from tests.tools.helpers import ROOT

PRODUCTS = ("mm", "addmm")


@dataclass(frozen=True)
class Counts:
    """Of one micro-batch. ``products_mb`` is the part of ``moved_mb`` that matrix products move; MB are 1e6 bytes."""

    model: str
    launches: int
    moved_mb: int
    products_mb: int
    syncs: int


def count(name: str) -> Counts:
    model = read_model_config(ModelConfig(config=str(ROOT / f"configs/model/{name}.json")))
    with FakeTensorMode():
        hidden = torch.empty(
            SEQUENCES, LENGTH, model.hidden_size, dtype=torch.bfloat16, device="cuda", requires_grad=True
        )
        weight = torch.empty(
            model.vocab_size, model.hidden_size, dtype=torch.bfloat16, device="cuda", requires_grad=True
        )
        labels = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long, device="cuda")
        with Watch() as watch:
            chunked_cross_entropy(hidden, weight, labels, float(labels.numel())).backward()
    products = sum(watch.bytes[operation] for operation in PRODUCTS)
    return Counts(
        name, watch.launches.total(), round(watch.bytes.total() / 1e6), round(products / 1e6), len(watch.syncs)
    )


def count_all() -> list[Counts]:
    torch.autograd.set_multithreading_enabled(False)  # backward in this thread, inside the modes
    return [count(name) for name in MODELS]


if __name__ == "__main__":
    sys.stdout.write(as_csv(count_all()))
