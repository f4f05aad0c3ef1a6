"""Lists and copies the settings that come with the package, and writes settings for a model size."""

import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Any

from relora_mora.cli.arguments import PositiveInt
from relora_mora.config.shipped import MODELS, SETTINGS, shipped_files

MOST_TOKENS = 1e15
TITLES = {
    "run": "Runs, for relora-mora pretrain NAME",
    "task": "Tasks, for relora-mora finetune NAME",
    "study": "Studies, for relora-mora study NAME",
    "model": "Models, for --model.config=NAME",
}


def main(
    *words: Annotated[str, "[copy NAME PATH | size PATH]"],
    depth: PositiveInt | None = None,
    method: str | None = None,
    matrices: str | None = None,
    tokens: float | None = None,
    tokens_per_parameter: float | None = None,
    sequence_length: PositiveInt | None = None,
    vocab_size: PositiveInt | None = None,
) -> None:
    """Lists the settings that come with the package, copies one, or writes settings for a model size.

    A command takes the name of shipped settings instead of a file. A copy is a start for settings of your own. So is a
    size: shape, rank, learning rates, batch and steps follow from the depth, and text and tokenizer are those of the
    demo.

    Size:
        depth: layers and heads; the hidden size is 64 times as much. 4 has 7 million parameters, 8 has 34, 12 is
            llama_130m
        method: remora (the default), lora or full
        matrices: optimizer of the decoder's linears or their adapters: muon (the default); adamw for lora and full
        tokens: tokens of the whole run, e.g. 2e6, instead of tokens_per_parameter
        tokens_per_parameter: the same for each parameter of the model; default: 20
        sequence_length: tokens of a sequence; default: 256
        vocab_size: pieces of the tokenizer; default: 8192

    Example:
        relora-mora configs size mine.yaml --depth=8
    """
    options = {
        "depth": depth,
        "method": method,
        "matrices": matrices,
        "tokens": tokens,
        "tokens_per_parameter": tokens_per_parameter,
        "sequence_length": sequence_length,
        "vocab_size": vocab_size,
    }
    given = {name: value for name, value in options.items() if value is not None}
    files = shipped_files([*SETTINGS, *MODELS])
    match words:
        case () if not given:
            for kind, title in TITLES.items():
                print(f"{title}:")
                for name, path in files.items():
                    if path.parent.name == kind:
                        print(f"  {name:<20}  {_title(path)}".rstrip())
        case ("copy", name, target) if not given:
            if name not in files:
                raise ValueError(f"{name}: not the name of shipped settings; relora-mora configs lists them")
            _refuse_existing(target)
            shutil.copyfile(files[name], target)
            print(f"copied {name} to {target}")
        case ("size", target) if "depth" in given:
            _refuse_existing(target)
            title = _write_size(target, given)
            print(f"wrote {target}: {title}")
        case _:
            command = " ".join([*words, *(f"--{name}={value}" for name, value in given.items())])
            raise ValueError(f"got {command}; give nothing, or: copy NAME PATH, or: size PATH --depth=N")


def _write_size(target: str, given: dict[str, Any]) -> str:
    """Writes the settings of a size that can be used as they are; returns what they are."""
    from relora_mora.config.load import config_of
    from relora_mora.config.yaml_text import dump_yaml
    from relora_mora.experiments.ladder import settings_of

    for name in ("tokens", "tokens_per_parameter"):
        if name in given and not 0 < given[name] <= MOST_TOKENS:
            raise ValueError(f"--{name}: got {given[name]:g}, expected a number above 0, and at most {MOST_TOKENS:g}")
    if "tokens" in given and "tokens_per_parameter" in given:
        raise ValueError("--tokens: given together with --tokens_per_parameter; give one of them")
    comments, settings = settings_of(**given)
    config_of(settings, target)
    command = " ".join(["relora-mora configs size PATH", *(f"--{name}={value}" for name, value in given.items())])
    lines = [f"written by: {command}", *comments]
    Path(target).write_text("".join(f"# {line}\n" for line in lines) + dump_yaml(settings), encoding="utf-8")
    return comments[0]


def _refuse_existing(target: str) -> None:
    if Path(target).exists() or Path(target).is_symlink():
        raise ValueError(f"{target}: already exists; give a new path, or remove it")


def _title(path: Path) -> str:
    """The first sentence of the comment at the top of a YAML file."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return (
        textwrap.shorten(line.removeprefix("# ").partition(". ")[0], 96, placeholder=" ...")
        if line.startswith("#")
        else ""
    )
