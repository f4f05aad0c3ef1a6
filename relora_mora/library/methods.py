"""The methods by name, for :func:`relora_mora.attach`. Each function returns the settings of one."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, get_args

from pydantic import ValidationError

from relora_mora.config.checks.combinations import own_faults
from relora_mora.config.schema import MethodConfig

Form = Literal["auto", "merged", "decoupled"]
Reset = Literal["full", "magnitude", "random", "none", "carry"]
Settings = ParamSpec("Settings")


def _names_a_near_setting(function: Callable[Settings, MethodConfig]) -> Callable[Settings, MethodConfig]:
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def method(*given: Settings.args, **settings: Settings.kwargs) -> MethodConfig:
        for name in settings.keys() - set(names):
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"its settings are {', '.join(names)}"
            raise TypeError(f"{function.__name__}() has no setting {name}; {remedy}")
        return function(*given, **settings)

    return method


@_names_a_near_setting
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
    return _method("lora", locals())


@_names_a_near_setting
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
    return _method("relora", locals())


@_names_a_near_setting
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
    return _method("mora", locals())


@_names_a_near_setting
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
    return _method("remora", locals())


def _method(name: str, arguments: dict[str, Any]) -> MethodConfig:
    """The settings of a method, from the arguments of its function."""
    if arguments["form"] not in get_args(Form):
        raise ValueError(f"form: expected one of {', '.join(get_args(Form))}, got {arguments['form']!r}")
    values = {"name": name, **arguments, "rank_pattern": dict(arguments["rank_pattern"] or {})}
    if "alpha" in values:
        values["lora_alpha"] = values.pop("alpha")
    if "operator" in values:
        values["operators"] = [values.pop("operator")]
    values["operators"] = list(values.get("operators", [1]))
    try:
        method = MethodConfig.model_validate(values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}, got {each['input']!r}" for each in error.errors()]
        raise ValueError(f"{name}: {'; '.join(faults)}") from None
    if method.square_size is not None and method.rank_pattern:
        raise ValueError("rank_pattern: square_size is R of every layer, so ranks have no effect; give one of the two")
    for fault in own_faults(method):
        raise ValueError(str(fault))
    return method
