"""Lists and copies the settings that come with the package."""

import re
import shutil
import textwrap
from pathlib import Path
from typing import Annotated

from relora_mora.config.shipped import MODELS, SETTINGS, shipped_files

WIDTH = 59  # of a title: 80 columns without the name
USES = {
    "run": "Runs, for relora-mora pretrain NAME or plan NAME",
    "task": "Tasks, for relora-mora finetune NAME or plan NAME",
    "study": "Studies, for relora-mora study NAME, or plan NAME for its first run",
    "model": "Models, for --model.config=NAME or relora-mora plan NAME",
}


def main(*words: Annotated[str, "[copy NAME PATH]"]) -> None:
    """Lists the settings that come with the package, or copies one.

    A command takes the name of shipped settings instead of a file. A copy is a start for settings of your own.

    Example:
        relora-mora configs copy tiny_remora mine.yaml
    """
    files = shipped_files([*SETTINGS, *MODELS])
    match words:
        case ():
            for kind, use in USES.items():
                names = [name for name, path in files.items() if path.parent.name == kind]
                print(f"{use}:")
                if kind == "model":
                    print(textwrap.fill(", ".join(names), 80, initial_indent="  ", subsequent_indent="  "))
                else:
                    print("\n".join(f"  {name:<18} {_title(files[name])}" for name in names))
        case ("copy", name, target):
            if name not in files:
                raise ValueError(f"{name}: not the name of shipped settings; relora-mora configs lists them")
            if Path(target).exists() or Path(target).is_symlink():
                raise ValueError(f"{target}: already exists; give a new path, or remove it")
            shutil.copyfile(files[name], target)
            print(f"copied {name} to {target}")
        case _:
            raise ValueError(f"got {' '.join(words)}; give nothing, or: copy NAME PATH")


def _title(path: Path) -> str:
    """The beginning of the comment at the top of a YAML file, as much of it as fits into 80 columns."""
    first = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(". ")[0]
    first = re.sub(r" \(arXiv [^)]*\)", "", first)
    clause = re.match(f".{{,{WIDTH}}}(?=[,:;] )", first)
    if len(first) > WIDTH and clause is not None:
        first = clause.group()
    return textwrap.shorten(first, WIDTH, placeholder=" ...")
