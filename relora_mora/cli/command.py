"""Runs a command: arguments, exit code, Ctrl-C, and a message instead of a traceback for a user's mistake."""

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from relora_mora.cli.arguments import read_arguments
from relora_mora.cli.help import Command, help_text
from relora_mora.system.files import place_of, remove_unfinished
from relora_mora.system.process import WakeupPipe, run_with_timeout, say

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
UNREAD = 141  # and for one whose output is read no more, as by head
GRACE_SECONDS = 3.0


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """While the block runs, SIGINT sets the event and raises KeyboardInterrupt; if the block does not end in time, the
    process exits.

    A library may compute for minutes before the main thread hears of the signal, and an import may swallow the
    exception, so a thread reads the signals from a :class:`WakeupPipe`. If the command sets its own handler, as the
    trainer does, this does nothing.
    """
    received, ended = threading.Event(), threading.Event()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        received.set()
        raise KeyboardInterrupt

    def on_signal(number: int) -> None:
        if number != signal.SIGINT or signal.getsignal(number) != handle or ended.wait(GRACE_SECONDS):
            return
        run_with_timeout(GRACE_SECONDS, lambda: say("interrupted"))
        run_with_timeout(GRACE_SECONDS, remove_unfinished)
        os._exit(128 + number)

    signal.signal(signal.SIGINT, handle)
    pipe = WakeupPipe(on_signal, "interrupts")
    try:
        yield received
    finally:
        ended.set()
        if signal.getsignal(signal.SIGINT) == handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        pipe.close()


USER_ERROR = 2
_PACKAGE = Path(__file__).resolve().parent.parent
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a place on another disk",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "check its permissions, or choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is not a folder; check the path",
    errno.EISDIR: "a file was expected; check the path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTEMPTY: "give a new folder, or remove it",
}


def run(command: Command, argv: Sequence[str] | None = None, *, name: str | None = None) -> NoReturn:
    """Calls ``command`` with the arguments of the command line, then exits with the int that it returns, or with 0.

    Arguments stay text. A parameter with another annotation, such as ``int | None``, is read as YAML and checked
    against its type. Bad arguments end the program before the command starts. A user's mistakes (the package's
    ValueErrors, OSError, a package that is not installed) are shown as one message without a traceback or a secret, and
    the exit code is 2; after Ctrl-C it is 130, and if the program that reads the output has ended, 141. ``name`` is the
    command's name in messages; default: the script's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with interrupts() as received:
        try:
            name = name or Path(sys.argv[0]).name
            if {"-h", "--help"} & set(words):
                print(help_text(command, name))  # noqa: T201
                result = None
            else:
                arguments = read_arguments(command, words, name)
                result = command(*arguments.args, **arguments.kwargs)
            code = result if isinstance(result, int) else 0
            flush_output()
        except (Exception, KeyboardInterrupt) as error:
            # libraries turn a KeyboardInterrupt into errors of their own
            if received.is_set() or isinstance(error, KeyboardInterrupt):
                say("interrupted")
                code = INTERRUPTED
            elif isinstance(error, BrokenPipeError):
                code = UNREAD
            elif _is_user_error(error, command):
                _show(error)
                code = USER_ERROR
            else:
                raise
            with contextlib.suppress(OSError):
                flush_output()
    raise SystemExit(code)


def _is_user_error(error: Exception, command: Command) -> bool:
    """A ValueError raised inside a library is not a user's error but a bug of ours, which needs its traceback."""
    if isinstance(error, ModuleNotFoundError):
        return not str(error.name).startswith("relora_mora.")
    if not isinstance(error, ValueError | OSError):
        return False
    if isinstance(error, OSError) or type(error).__module__.startswith("relora_mora."):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(raised_in).resolve().is_relative_to(_PACKAGE) or raised_in == command.__code__.co_filename
    return ours and not isinstance(error, UnicodeError)


def flush_output() -> None:
    """Finds a full disk or a closed pipe now; the interpreter would find it when it exits and change the exit code."""
    if sys.stdout is None:  # it was closed before the start
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # the interpreter writes the rest of the buffer there when it exits
        os.dup2(nowhere, sys.stdout.fileno())
        raise


def _show(error: Exception) -> None:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    rank_on_host = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    if getattr(error, "same_on_all_ranks", False) and rank != "0":
        return  # the first rank shows it
    if getattr(error, "same_on_host", False) and rank_on_host != "0":
        return
    message = str(error)
    if isinstance(error, ModuleNotFoundError):
        message = (
            f"{error} for {sys.executable}: activate the environment (source .venv/bin/activate), "
            "or create it first (make env)"
        )
    else:
        from relora_mora.config.secrets import redact

        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            message = ": ".join(filter(None, (place_of(error), error.strerror)))
            remedy = _REMEDIES.get(error.errno)
            message += f"; {remedy}" if remedy else ""
        message = redact(message)
    say(message if rank == "0" else f"[rank {rank}] {message}")
