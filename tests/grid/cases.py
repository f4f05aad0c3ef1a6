"""The cases of the covering grid, and their settings."""

import os
import zlib
from collections.abc import Sequence
from typing import Any

from relora_mora.config.registry import METHODS
from tests.tools.grids import STAGES, Case, grid
from tests.tools.rules import EXAMPLES, matrices_settings

STEPS = 7
MERGE_EVERY = 3  # merges after the steps 3 and 6
STOPS = (2, 3, 4)  # before, at and after a merge
RULE = {"rank": 4, "every": 3, "eps": 1e-4}
DEEPSPEED: dict[int, tuple[dict[str, Any], ...]] = {  # its own settings, by stage
    0: ({},),
    1: ({}, {"round_robin_gradients": True}),
    2: ({}, {"overlap_comm": True, "reduce_bucket_size": 1000}, {"contiguous_gradients": False}),
    3: (
        {},
        {"sub_group_size": 1000, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 0},
        {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1000},
    ),
}
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "apart": {},
    "tied": {"model": {"overrides": {"tie_word_embeddings": True}}},
    "frozen": {"method": {"train_embeddings": False, "train_norms": False, "train_head": False}},
}


def is_valid(case: Case) -> bool:
    """Settings that a method or an optimizer does not use have one value."""
    method = METHODS[case["method"]]
    has_moments = case["matrices"] in ("adamw", "muon")
    return all(
        (
            method.adapter is not None or (case["base"] == "none" and case["form"] == "auto"),
            method.merges or case["reset"] == "full",
            case["reset"] != "carry" or case["method"] == "remora",
            case["reset"] in ("full", "none") or has_moments,
            case["form"] != "resident" or case["stage"] < 3,
            method.adapter is not None or case["embeddings"] != "frozen",
            case["operator"] == 1 or (case["method"] in ("mora", "remora") and case["reset"] != "carry"),
        )
    )


VALUES: dict[str, tuple[Any, ...]] = {
    "method": tuple(METHODS),
    "operator": (1, 6),  # a grouping, and the rotations, which have no carry
    "stage": STAGES,
    "precision": ("fp32", "bf16"),
    "ranks": (1, 2),
    "matrices": ("adamw", "muon", "adamw8bit", *EXAMPLES),
    "others": ("adamw", "adamw8bit"),
    "base": ("none", "int8", "fp8"),
    "form": ("auto", "merged", "resident", "decoupled"),
    "reset": ("full", "magnitude", "random", "none", "carry"),
    "embeddings": tuple(EMBEDDINGS),
    "saving": ("activations", "checkpointing"),
    "kernels": ("compiled", "torch"),
}
CASES = grid(is_valid, VALUES)


def cases_of(*methods: str) -> list[Any]:
    """The cases of some methods."""
    return [each for each in CASES if each.values[0]["method"] in methods]


def choice(case: Case, options: Sequence[Any]) -> Any:
    """One of the options, the same each time; all of them occur in ``make test`` (test_covering.py)."""
    return options[zlib.crc32(str(case).encode()) % len(options)]


def multiplies(case: Case) -> bool:
    """Whether products with weights in 8 bits are in 8 bits too; the others are as exact as those of float32."""
    return case["form"] in ("resident", "decoupled")


def sections_of(case: Case) -> dict[str, dict[str, Any]]:
    base = {} if case["base"] == "none" else {"base": case["base"], "base_products": multiplies(case)}
    method = {"name": case["method"], "merge_every": MERGE_EVERY, "form": case["form"], **base}
    method |= {"operators": [case["operator"], 2], "square_multiple": 2}
    optim = {"clip": 0.5, "weight_decay": 0.1, "eps": 1e-4, "others": case["others"]}
    own = EMBEDDINGS[case["embeddings"]]
    training = {"zero_stage": case["stage"], "precision": case["precision"], "steps": STEPS, "deterministic": True}
    zero = {"zero_optimization": choice(case, DEEPSPEED[case["stage"]])}
    return {
        "model": {"activation_checkpointing": case["saving"] == "checkpointing", **own.get("model", {})},
        "method": {**method, **own.get("method", {}), "reset": case["reset"], "reset_ratio": 0.75},
        "optim": optim | matrices_settings(case["matrices"], **RULE),
        "train": training | {"deepspeed": zero},
        "eval": {"every_steps": 3},
    }


def bound(case: Case) -> float:
    """Of the losses' relative difference from plain torch in float32, which stores weights in 8 bits, too."""
    if case["base"] != "none" and multiplies(case):  # rounds activations
        return 5e-3
    if case["precision"] == "bf16":
        return 2e-3
    rounds_codes = "adamw8bit" in (case["matrices"], case["others"])
    return 1e-4 if os.environ.get("TEST_DEVICE") == "cuda" else 1e-5 if rounds_codes else 5e-6
