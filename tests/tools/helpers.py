"""What several tests use; nothing but Python's own modules is imported with it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
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


def python_path() -> str:
    """PYTHONPATH with this checkout before its current value, which may name folders of packages."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
