"""Runs a command: arguments, exit code, Ctrl-C, and one message in place of a traceback for what the user can mend."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from relora_mora.cli.arguments import Command, help_text, read_arguments
from relora_mora.cli.interrupt import INTERRUPTED, Interrupts
from relora_mora.system.disk_errors import place_of
from relora_mora.system.stderr import say

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
    errno.ENOTEMPTY: "give a new folder, or remove it",
    errno.EPIPE: "the program that reads the output has ended",
}


def run(command: Command, argv: Sequence[str] | None = None, *, name: str | None = None) -> None:
    """Calls ``command`` with the arguments of the command line and exits with 0, or the int that it returned.

    Arguments arrive as they were typed; a parameter annotated as something else than text, such as ``int | None``, is
    read as YAML and checked against its type. Bad arguments end the program before the command starts. Mistakes of the
    user (the package's ValueErrors, OSError, a package that is not installed) are shown as one message without a
    traceback or a secret, and the exit code is 2; after Ctrl-C it is 130. ``name`` is what messages call the command;
    default: the script's file name.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _warn_of_another_checkout(Path(sys.argv[0]))
    with Interrupts() as interrupts:
        try:
            code = _call(command, words, name or Path(sys.argv[0]).name)
            _flush_output()
        except (Exception, KeyboardInterrupt) as error:
            # libraries turn a KeyboardInterrupt into errors of their own
            if interrupts.received or isinstance(error, KeyboardInterrupt):
                interrupts.say()
                code = INTERRUPTED
            elif _is_user_error(error, command):
                _show(error)
                code = USER_ERROR
            else:
                raise
            with contextlib.suppress(OSError):
                _flush_output()
    raise SystemExit(code)


def missing_package(error: ModuleNotFoundError) -> str:
    """The message for a command that was started outside its environment."""
    return (
        f"{error} for {sys.executable}: activate the environment (source .venv/bin/activate), "
        "or make one first (make env)"
    )


def _warn_of_another_checkout(script: Path) -> None:
    """A copied environment runs the package of the checkout that it was made in."""
    beside = script.resolve().parent.parent / "relora_mora"
    if script.is_file() and (beside / "__init__.py").is_file() and beside != _PACKAGE and _rank_on_host() == "0":
        say(
            f"warning: this runs the package in {_PACKAGE}, not that in {beside}; remove the environment and make it "
            f"anew (make env), or give {sys.executable} -m pip install -e {beside.parent}"
        )


def _call(command: Command, words: list[str], name: str) -> int:
    if {"-h", "--help"} & set(words):
        print(help_text(command, name))  # noqa: T201
        return 0
    arguments = read_arguments(command, words, name)
    result = command(*arguments.args, **arguments.kwargs)
    return result if isinstance(result, int) else 0


def _is_user_error(error: Exception, command: Command) -> bool:
    """A ValueError from inside a library is not one: that is a fault of the program, and its traceback is needed."""
    if isinstance(error, ModuleNotFoundError):
        return not str(error.name).startswith("relora_mora.")
    if not isinstance(error, ValueError | OSError):
        return False
    if isinstance(error, OSError) or type(error).__module__.startswith("relora_mora."):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(raised_in).resolve().is_relative_to(_PACKAGE) or raised_in == command.__code__.co_filename
    return ours and not isinstance(error, UnicodeError)


def _flush_output() -> None:
    """Finds a full disk or a closed pipe now: the interpreter would find it at its end and change the exit code."""
    if sys.stdout is None:  # closed at the start
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still in the buffer when the interpreter ends
        os.dup2(nowhere, sys.stdout.fileno())
        raise


def _show(error: Exception) -> None:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if getattr(error, "same_on_all_ranks", False) and rank != "0":
        return  # the first rank says it
    if getattr(error, "same_on_host", False) and _rank_on_host() != "0":
        return
    prefix = "" if rank == "0" else f"[rank {rank}] "
    if isinstance(error, ModuleNotFoundError):
        say(prefix + missing_package(error))
        return
    from relora_mora.config.secrets import redact

    say(prefix + redact(_message(error)))


def _rank_on_host() -> str:
    return os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"


def _message(error: Exception) -> str:
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return str(error)
    place = place_of(error)
    said = error.strerror if place is None else f"{place}: {error.strerror}"
    remedy = _REMEDIES.get(error.errno)
    return said if remedy is None else f"{said}; {remedy}"
