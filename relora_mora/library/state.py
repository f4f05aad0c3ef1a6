"""The state of attached adapters: what it holds, whether it belongs to a model, and its file."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from relora_mora.adapters.layers import AdapterLinear
from relora_mora.config.schema import MethodConfig
from relora_mora.schedule import Schedule

FILE = "remora.safetensors"
PROGRESS = ("step", "skipped", "merges_done", "operator", "base")


def identity_of(method: MethodConfig, seed: int, layers: Mapping[str, AdapterLinear]) -> dict[str, Any]:
    """What must be the same when a run continues."""
    return {
        "method": method.name,
        "seed": seed,
        "rank": method.rank,
        "rank_pattern": dict(method.rank_pattern),
        "alpha": method.lora_alpha,
        "square_size": method.square_size,
        "square_multiple": method.square_multiple,
        "operators": list(method.cycle),
        "merge_every": method.merge_every if method.merges else None,
        "targets": list(layers),
        "dtypes": sorted({str(layer.base_weight.dtype) for layer in layers.values()}),
    }


def check_state(
    state: Mapping[str, Any], identity: Mapping[str, Any], clock: Schedule, layers: Mapping[str, AdapterLinear]
) -> bool:
    """Whether the run of a state ended at a step after which this clock merges: the last step does not merge.

    Raises ValueError if the state lacks something, or belongs to other adapters than those with this identity, to
    another course of merges, or to weights of another dtype.
    """
    missing = {*identity, *PROGRESS} - set(state)
    if missing:
        raise ValueError(f"this is not a state of adapters of this release: it has no {', '.join(sorted(missing))}")
    step = int(state["step"])
    owes = state.get("total_steps") == step and clock.merge_after(step)
    before = step - 1 if owes else step
    expected = {**identity, "merges_done": clock.merges_done(before), "operator": clock.operator(before)}
    different = [
        f"{key} is {reprlib.repr(state[key])}, expected {reprlib.repr(value)}"
        for key, value in expected.items()
        if state[key] != value
    ]
    if different:
        raise ValueError(
            f"the state belongs to other adapters: {'; '.join(different)}; call attach() and schedule() with the "
            "values that the state was made with"
        )
    weights = {f"{name}.weight": layer.base_weight for name, layer in layers.items()}
    rounded = {name for name, weight in weights.items() if weight.dtype != torch.float32}
    if (state["merges_done"] and rounded - set(state["base"])) or set(state["base"]) - set(weights):
        raise ValueError(
            f"the state has float32 values of {len(state['base'])} frozen weights, and the model needs them of "
            f"{len(rounded)}; load the file that the first rank saved, into a model of the same dtype"
        )
    return owes


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    values = {key: value for key, value in state.items() if key != "base"}
    safetensors.torch.save_file(state["base"], temporary, metadata={"state": json.dumps(values)})
    temporary.replace(path)


def read_state(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError if the folder has no state."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no state of the adapters; resume from a folder that has one")
    with safetensors.safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    return {**state, "base": safetensors.torch.load_file(path)}
