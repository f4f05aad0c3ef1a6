"""Calls a command: fire reads its arguments, but nothing starts before all of them are good."""

from __future__ import annotations

import contextlib
import errno
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

from relora_mora.cli.interrupt import INTERRUPTED, Interrupts, say
from relora_mora.system.disk_errors import place_of

USER_ERROR = 2
_PACKAGE = Path(__file__).resolve().parent.parent
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a place on another disk",
    errno.EDQUOT: "free some space, or choose a place on another disk",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is no folder; check the path",
    errno.EISDIR: "a file was expected; check the path",
    errno.ELOOP: "check the links of this path",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.EPIPE: "the program that reads the output has ended",
}


def run(main: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Calls ``main`` with the arguments of the command line and exits: with 0, or with the int that ``main`` returned.

    Arguments come as they were typed (fire alone would turn ``1e5`` into a float and ``a,b`` into a tuple); a parameter
    annotated as something else than text, such as ``int | None``, is read as YAML and checked against its type. Stray
    arguments and unknown flags end the program before ``main`` starts. ``--local_rank``, which DeepSpeed's launcher adds,
    is dropped unless ``main`` takes it: LOCAL_RANK in the environment says the same. Mistakes of the user (the package's
    ValueErrors, OSError) are shown as one message without a traceback or a secret; the exit code is 2. After Ctrl-C it is 130.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    with Interrupts() as interrupts:
        try:
            code = _call(main, given, Path(sys.argv[0]).name)
            _flush_output()
        except (Exception, KeyboardInterrupt) as error:
            if interrupts.received or isinstance(error, KeyboardInterrupt):  # libraries make other errors of it
                say()
                code = INTERRUPTED
            elif _is_user_error(error, main):
                _show(error)
                code = USER_ERROR
            else:
                raise
            with contextlib.suppress(OSError):
                _flush_output()
    raise SystemExit(code)


def _call(main: Callable[..., Any], given: list[str], name: str) -> int:
    if {"-h", "--help"} & set(given):
        from fire import helptext, trace

        print(helptext.HelpText(main, trace=trace.FireTrace(main, name=name)))  # noqa: T201
        return 0
    args, kwargs = _parse(main, _without_local_rank(main, given), name)
    result = main(*args, **kwargs)
    return result if isinstance(result, int) else 0


def _parse(main: Callable[..., Any], argv: list[str], name: str) -> tuple[list[Any], dict[str, Any]]:
    from relora_mora.config import ConfigError
    from relora_mora.config.secrets import secret_in

    signature, hints = inspect.signature(main), typing.get_type_hints(main)
    faults = [
        f"{argument}: stray; see {name} --help" for argument in argv if argument in ("-", "--")
    ]  # fire's own separators
    faults += [f"{argument.partition('=')[0]}: {secret}" for argument in argv if (secret := secret_in(argument))]
    faults += [
        f"{argument!a}: is not UTF-8; check the terminal's locale" for argument in argv if not _is_utf8(argument)
    ]
    flags = [argument.split("=")[0] for argument in argv if argument.startswith("--") and "=" in argument]
    faults += [
        f"{flag}: given twice; give it once" for flag in sorted({flag for flag in flags if flags.count(flag) > 1})
    ]
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


def _fire(
    main: Callable[..., Any], signature: inspect.Signature, argv: list[str], name: str
) -> tuple[list[Any], dict[str, Any]]:
    import fire
    from fire import decorators

    from relora_mora.config import ConfigError

    found: list[tuple[list[Any], dict[str, Any]]] = []

    @functools.wraps(main)
    def capture(*args: Any, **kwargs: Any) -> None:
        found.append((list(args), kwargs))

    # fire refuses what is left over only after its call, so it calls capture; what has a default is a flag, never positional
    flag, kinds = inspect.Parameter.KEYWORD_ONLY, (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    parameters = [
        p.replace(kind=flag) if p.kind in kinds and p.default is not p.empty else p
        for p in signature.parameters.values()
    ]
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
    if value == "":
        faults.append(f"--{name}: is empty; give a value, see --help")
        return None
    if not isinstance(value, str) or expected is str or str in typing.get_args(expected):
        return value
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from relora_mora.config import parse_yaml

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


def _is_user_error(error: Exception, main: Callable[..., Any]) -> bool:
    """Not a ValueError from inside a library: that one is a fault of the program and needs its traceback."""
    if not isinstance(error, ValueError | OSError):
        return False
    if isinstance(error, OSError) or type(error).__module__.startswith("relora_mora."):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(raised_in).resolve().is_relative_to(_PACKAGE) or raised_in == main.__code__.co_filename
    return ours and not isinstance(error, UnicodeError)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flush_output() -> None:
    """So that a full disk or a closed pipe is a message, and not a remark of the interpreter that hides the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # where the interpreter writes the rest at its end
        raise


def _show(error: Exception) -> None:
    from relora_mora.config.secrets import redact

    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if getattr(error, "same_on_all_ranks", False) and rank != "0":
        return  # every rank finds the same; the first one says it
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        place = place_of(error)
        place = "" if place is None else f"{place}: "
        text = "; ".join([f"{place}{error.strerror}", *filter(None, [_REMEDIES.get(error.errno)])])
    prefix = f"[rank {rank}] " if rank != "0" else ""
    print(f"{prefix}{redact(text)}", file=sys.stderr)  # noqa: T201
