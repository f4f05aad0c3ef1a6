"""Which model an adapter belongs to: some numbers of one of its weights, kept in the header of the adapter's file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

KEY = "base_weight"
_SAMPLES = 32
_TOLERANCE = 2**-8  # of each: a model saved in bf16 or fp16 is the same
_SMALLEST = 1e-6  # fp16 has no finer steps near zero


def note_of(name: str, weight: Tensor) -> str:
    """What a file keeps of a model: the weight's name and numbers of it, evenly over its elements."""
    return json.dumps({"name": name, "values": _sample(weight).tolist()})


def is_of_another(noted: str, weight_of: Callable[[str], Tensor | None]) -> bool:
    """Whether a note is that of another model than one with these weights. A note that is damaged says nothing."""
    try:
        note = json.loads(noted)
        expected = torch.tensor(note["values"], dtype=torch.float32)
        weight = weight_of(note["name"]) if isinstance(note, Mapping) else None
    except (ValueError, KeyError, TypeError):
        return False
    found = None if weight is None else _sample(weight)
    return found is None or not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_SMALLEST)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    places = [number * (flat.numel() - 1) // (_SAMPLES - 1) for number in range(_SAMPLES)]
    return flat[places].float().cpu()
