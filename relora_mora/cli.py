"""Command lines of launch/ and tokenizer/: fire reads the arguments, but nothing starts before all of them are good."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire
import yaml
from fire import decorators, helptext, trace
from pydantic import TypeAdapter, ValidationError

from relora_mora.config import ConfigError, parse_yaml

USER_ERROR = 2
_PACKAGE = Path(__file__).resolve().parent


def run(main: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Calls ``main`` with the arguments of the command line and exits: with 0, or with the int that ``main`` returned.

    Arguments come as they were typed (fire alone would turn ``1e5`` into a float and ``a,b`` into a tuple); a parameter
    annotated as something else than text, such as ``int | None``, is read as YAML and checked against its type. Stray
    arguments and unknown flags end the program before ``main`` starts. ``--local_rank``, which DeepSpeed's launcher adds,
    is dropped unless ``main`` takes it: LOCAL_RANK in the environment says the same. Mistakes of the user (the package's
    ValueErrors, OSError) are shown as one message without a traceback; the exit code is 2.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    name = Path(sys.argv[0]).name
    if {"-h", "--help"} & set(given):
        print(helptext.HelpText(main, trace=trace.FireTrace(main, name=name)))  # noqa: T201
        raise SystemExit(0)
    try:
        args, kwargs = _parse(main, _without_local_rank(main, given), name)
        result = main(*args, **kwargs)
    except (ValueError, OSError) as error:
        if not _is_user_error(error, main):
            raise
        _show(error)
        raise SystemExit(USER_ERROR) from None
    raise SystemExit(result if isinstance(result, int) else 0)


def _parse(main: Callable[..., Any], argv: list[str], name: str) -> tuple[list[Any], dict[str, Any]]:
    signature, hints = inspect.signature(main), typing.get_type_hints(main)
    faults = [f"{argument}: stray; see {name} --help" for argument in argv if argument in ("-", "--")]  # fire's own separators
    flags = [argument.split("=")[0] for argument in argv if argument.startswith("--") and "=" in argument]
    faults += [f"{flag}: given twice; give it once" for flag in sorted({flag for flag in flags if flags.count(flag) > 1})]
    if faults:
        raise ConfigError(faults, "the command line")
    args, kwargs = _fire(main, signature, argv, name)
    for index, parameter in enumerate(list(signature.parameters)[: len(args)]):
        args[index] = _typed(parameter, args[index], hints.get(parameter, str), faults)
    for key in kwargs:
        if key in signature.parameters:
            kwargs[key] = _typed(key, kwargs[key], hints.get(key, str), faults)
    if faults:
        raise ConfigError(faults, "the command line")
    return args, kwargs


def _fire(main: Callable[..., Any], signature: inspect.Signature, argv: list[str], name: str) -> tuple[list[Any], dict[str, Any]]:
    found: list[tuple[list[Any], dict[str, Any]]] = []

    @functools.wraps(main)
    def capture(*args: Any, **kwargs: Any) -> None:
        found.append((list(args), kwargs))

    # fire refuses what is left over only after its call, so it calls capture; what has a default is a flag, never positional
    flag, kinds = inspect.Parameter.KEYWORD_ONLY, (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    parameters = [p.replace(kind=flag) if p.kind in kinds and p.default is not p.empty else p for p in signature.parameters.values()]
    capture.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            fire.Fire(decorators.SetParseFn(str)(capture), command=argv, name=name, serialize=lambda _: None)
    except SystemExit:
        text = messages.getvalue().partition("ERROR: ")[2].partition("\n")[0]
        text = text.replace("Could not consume arg:", "unknown or stray argument:")
        raise ConfigError([f"{text}; see {name} --help"], "the command line") from None
    return found[0]


def _typed(name: str, value: Any, expected: Any, faults: list[str]) -> Any:
    """``value`` as the annotated type; text stays as typed, and so does a default."""
    if not isinstance(value, str) or expected is str or str in typing.get_args(expected):
        return value
    try:
        return TypeAdapter(expected).validate_python(parse_yaml(value), strict=True)
    except (yaml.YAMLError, ValidationError):
        faults.append(f"--{name}: got {value!r}, expected {getattr(expected, '__name__', expected)}; see --help")
        return None


def _without_local_rank(main: Callable[..., Any], argv: list[str]) -> list[str]:
    if "local_rank" in inspect.signature(main).parameters:
        return argv
    kept: list[str] = []
    for position, argument in enumerate(argv):
        follows = position > 0 and argv[position - 1] in ("--local_rank", "--local-rank") and argument.isdigit()
        if not follows and not argument.replace("-", "_").startswith("__local_rank"):
            kept.append(argument)
    return kept


def _is_user_error(error: ValueError | OSError, main: Callable[..., Any]) -> bool:
    """Not a ValueError from inside a library: that one is a fault of the program and needs its traceback."""
    if isinstance(error, OSError) or type(error).__module__.startswith("relora_mora."):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(raised_in).resolve().is_relative_to(_PACKAGE) or raised_in == main.__code__.co_filename
    return ours and not isinstance(error, UnicodeError)


def _show(error: Exception) -> None:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if getattr(error, "same_on_all_ranks", False) and rank != "0":
        return  # every rank finds the same; the first one says it
    prefix = f"[rank {rank}] " if rank != "0" else ""
    print(f"{prefix}{error}", file=sys.stderr)  # noqa: T201
