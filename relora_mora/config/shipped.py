"""The files in ``configs/``, which come with the package, by name: ``tiny_remora``, ``llama_130m``; and near misses."""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from relora_mora.system.files import from_home

FOLDER = Path(__file__).resolve().parent.parent / "configs"
SETTINGS = ("run", "task", "study")  # folders; a name is in one of them only
MODELS = ("model",)


def shipped_files(kinds: Sequence[str]) -> dict[str, Path]:
    """The shipped files of these folders by name."""
    return {path.stem: path for kind in kinds for path in sorted((FOLDER / kind).iterdir())}


def find_config(given: str | Path, kinds: Sequence[str] = SETTINGS) -> Path:
    """The file that a user means by a path, or by the name of a shipped file in these folders.

    A file that exists wins, but not a folder. A path that begins with ``configs/`` exists in a checkout; elsewhere it
    is the shipped file. If there is no such file, the path is returned as it is.
    """
    path = Path(from_home(str(given)))
    if exists(path) and not path.is_dir():
        return path
    name = path.stem if path.parts[:1] == ("configs",) else str(path)
    return shipped_files(kinds).get(name, path)


def with_names(text: str) -> str:
    """A text with the names of shipped files, as a user gives them, in place of their paths."""
    return re.sub(rf"{re.escape(str(FOLDER))}/\w+/(\w+)\.\w+", r"\1", text)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: the one that is spelled most similarly, if any is similar."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for a name that is too long
