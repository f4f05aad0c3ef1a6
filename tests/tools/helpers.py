"""What several tests use; nothing but Python's own modules is imported with it."""

import contextlib
import io
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("relora_mora", "kernels", "_kernels.so")
RUBBISH = bytes(range(256)) * 4  # the content of no file format


@contextlib.contextmanager
def arithmetic_put_back() -> Iterator[None]:
    """Undoes what train.deterministic switches."""
    import torch
    from torch._inductor import config as inductor

    with mock.patch.dict("os.environ"):
        yield
    if hasattr(inductor, "deterministic"):  # from torch 2.10 on
        inductor.deterministic = False
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A temporary checkout of a commit."""
    with tempfile.TemporaryDirectory(prefix="checkout-") as folder:
        checkout = Path(folder, "relora_mora")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", checkout, commit], check=True)
        try:
            yield checkout
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", checkout], check=True)


def python_path() -> str:
    """PYTHONPATH with this checkout before its current value, which may name folders of packages."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def wait_until(
    true: Callable[[], Any], seconds: float, otherwise: Callable[[], Any] = str, poll_seconds: float = 0.05
) -> Any:
    """What ``true()`` is as soon as it is true; fails with ``otherwise()`` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {otherwise()}"
        time.sleep(poll_seconds)
    return value
