"""Whether an extension of Python can be compiled at run time, as Triton and torch.compile do."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

# variable that names one, and those that are looked for without it; torch.compile knows no other for C++
COMPILERS = {"C": ("CC", ("gcc", "clang")), "C++": ("CXX", ("g++",))}


def missing_to_compile(language: Literal["C", "C++"]) -> str | None:
    """What there is not, and the remedy; None where nothing is missing."""
    variable, names = COMPILERS[language]
    if given := os.environ.get(variable):
        names = (given,)
    if not any(map(shutil.which, names)):
        return f"there is no {language} compiler ({' or '.join(names)}); install one, or name it in {variable}"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"there is no Python.h in {headers}; install Python's headers (python3-dev)"
    return None
