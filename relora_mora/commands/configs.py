"""Lists and copies the settings that come with the package."""

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

from relora_mora.config.shipped import MODELS, SETTINGS, shipped_files

TITLES = {
    "run": "Runs, for relora-mora pretrain NAME",
    "task": "Tasks, for relora-mora finetune NAME",
    "study": "Studies, for relora-mora study NAME",
    "model": "Models, for --model.config=NAME",
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
            for kind, title in TITLES.items():
                print(f"{title}:")
                for name, path in files.items():
                    if path.parent.name == kind:
                        print(f"  {name:<20}  {_title(path)}".rstrip())
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
    """The first sentence of the comment at the top of a YAML file."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return (
        textwrap.shorten(line.removeprefix("# ").partition(". ")[0], 96, placeholder=" ...")
        if line.startswith("#")
        else ""
    )
