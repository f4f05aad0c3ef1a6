"""The methods by name, for :func:`relora_mora.attach`. Each function returns the settings of one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import ValidationError

from relora_mora.config.checks.method import own_faults
from relora_mora.config.schema import MethodConfig

Form = Literal["auto", "merged", "decoupled"]
Reset = Literal["full", "magnitude", "random", "none", "carry"]


def LoRA(
    rank: int = 128,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    form: Form = "auto",
    rank_pattern: Mapping[str, int] | None = None,
) -> MethodConfig:
    """``W + (alpha / rank) B A`` (arXiv 2106.09685); ``alpha`` is ``rank`` by default.

    ``rank_pattern`` has the ranks that differ, by the last part of a layer's name. ``dropout`` applies to the adapter's
    input. ``form`` says how a layer computes its output (docs/method.md). Raises ValueError for values out of range.
    """
    return _method("lora", rank, form, rank_pattern, lora_alpha=alpha, dropout=dropout)


def ReLoRA(
    rank: int = 128,
    *,
    merge_every: int = 2000,
    merge_until_step: int | None = None,
    reset: Reset = "full",
    reset_ratio: float = 0.9,
    alpha: float | None = None,
    form: Form = "auto",
    rank_pattern: Mapping[str, int] | None = None,
) -> MethodConfig:
    """LoRA that is merged every ``merge_every`` optimizer steps (arXiv 2307.05695).

    A merge adds the delta to the frozen weight and resets the adapter and its optimizer state: ``reset`` says how
    (docs/method.md), and ``reset_ratio`` is the share of the state that ``magnitude`` and ``random`` set to zero.
    """
    merging = {"merge_every": merge_every, "merge_until_step": merge_until_step}
    resets = {"reset": reset, "reset_ratio": reset_ratio}
    return _method("relora", rank, form, rank_pattern, lora_alpha=alpha, **merging, **resets)


def MoRA(
    rank: int = 128,
    *,
    operator: int = 1,
    square_size: int | None = None,
    square_multiple: int = 1,
    dropout: float = 0.0,
    form: Form = "auto",
    rank_pattern: Mapping[str, int] | None = None,
) -> MethodConfig:
    """``W + D M C`` with M [R, R] (arXiv 2405.12130, eq. 6), R = floor(sqrt((in + out) rank)) or ``square_size``.

    R is rounded down to a multiple of ``square_multiple``. ``operator`` is the type of C and D (docs/method.md).
    """
    squares: dict[str, Any] = {"operators": [operator], "square_size": square_size, "square_multiple": square_multiple}
    return _method("mora", rank, form, rank_pattern, dropout=dropout, **squares)


def ReMoRA(
    rank: int = 128,
    *,
    operators: Sequence[int] = (1, 2),
    merge_every: int = 2000,
    merge_until_step: int | None = None,
    reset: Reset = "full",
    reset_ratio: float = 0.9,
    square_size: int | None = None,
    square_multiple: int = 1,
    form: Form = "auto",
    rank_pattern: Mapping[str, int] | None = None,
) -> MethodConfig:
    """MoRA that is merged as in :func:`ReLoRA`; every merge goes on to the next of ``operators``."""
    merging = {"merge_every": merge_every, "merge_until_step": merge_until_step}
    resets = {"reset": reset, "reset_ratio": reset_ratio}
    squares: dict[str, Any] = {
        "operators": list(operators),
        "square_size": square_size,
        "square_multiple": square_multiple,
    }
    return _method("remora", rank, form, rank_pattern, **squares, **merging, **resets)


def _method(name: str, rank: int, form: Form, rank_pattern: Mapping[str, int] | None, **settings: Any) -> MethodConfig:
    values = {"name": name, "rank": rank, "form": form, "rank_pattern": dict(rank_pattern or {}), **settings}
    if form not in get_args(Form):
        raise ValueError(f"form: expected one of {', '.join(get_args(Form))}, got {form!r}")
    try:
        method = MethodConfig.model_validate(values)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r}" for fault in error.errors()
        ]
        raise ValueError(f"{name}: {'; '.join(faults)}") from None
    if method.square_size is not None and method.rank_pattern:
        raise ValueError("rank_pattern: square_size is R of every layer, so ranks have no effect; give one of the two")
    for fault in own_faults(method):
        raise ValueError(str(fault))
    return method
