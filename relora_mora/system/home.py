"""Paths that begin with ``~``."""

from __future__ import annotations

import os


def from_home(path: str) -> str:
    """With the home folder in place of a leading ``~`` or ``~user``; as it is where there is neither, or no such user.

    ``Path.expanduser`` raises for that, and changes texts that are no paths, such as urls.
    """
    return os.path.expanduser(path)  # noqa: PTH111
