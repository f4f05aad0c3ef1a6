"""Tokenizes text or records once, so that runs can read the tokens: data.train=OUT (docs/data.md)."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from relora_mora.cli.arguments import Processes
from relora_mora.config.shipped import find_config
from relora_mora.system.process import many_imports

if TYPE_CHECKING:
    from relora_mora.config.data import DataConfig, Split


def main(
    source: str,
    out: str,
    *,
    tokenizer: str | None = None,
    split: Literal["train", "validation"] = "train",
    processes: Processes | None = None,
    finetune: bool = False,
    **overrides: str,
) -> None:
    """Tokenizes text or records once, for many runs.

    It writes a folder that data.train can name. If it is started again, it continues with what is missing.

    Arguments:
        source: the settings of a run (.yaml), which give text, tokenizer and limits; or a source of text as in
            data.train (a path, a glob, a url, allenai/c4), or a YAML list of them
        out: the folder to write
        overrides: how the text is read, as --data.KEY=VALUE, for instance --data.text_column=content;
            docs/settings.md lists them

    Options:
        tokenizer: folder or .model file; default: the tokenizer in the settings
        split: which text of the settings, or which split of a named set
        processes: number of processes, each of which tokenizes one shard at a time; default: one per core
        finetune: the settings are for relora-mora finetune and its defaults

    Example:
        relora-mora tokenize paper_250m_remora tokens/c4 --processes=8
    """
    with many_imports():
        from relora_mora.config.data import is_mixture
        from relora_mora.data.sources import configured_shards, split_remark
        from relora_mora.data.tokens.make import make_tokens
        from relora_mora.system.logs import counted

    started = time.monotonic()
    data, tokenizer = _settings(source, split, tokenizer, overrides, finetune=finetune)
    named = len(data.train) if is_mixture(data.train) else 1
    if (named if split == "train" else len(data.validation)) > 1:
        raise ValueError(
            f"{source}: data.{split} names several sources; tokenize each into a folder of its own "
            "(SOURCE OUT --tokenizer=...), and give these folders as sources"
        )
    shards = configured_shards(data, split)
    if remark := split_remark(shards, data):
        print(remark, flush=True)
    totals = make_tokens(
        shards,
        Path(out),
        config=data,
        tokenizer_path=tokenizer,
        processes=processes or len(os.sched_getaffinity(0)),
    )
    print(
        f"{out}: {totals.tokens:,} tokens of {counted(totals.documents, 'document')} in "
        f"{counted(len(shards), 'file')}, {time.monotonic() - started:.1f} s"
    )
    if totals.bad:
        print(f"{totals.bad:,} of {totals.rows:,} rows were bad and skipped")
    print(f"use it with --data.{split}={out}")


def _settings(
    source: str, split: "Split", tokenizer: str | None, overrides: dict[str, str], *, finetune: bool
) -> tuple["DataConfig", str]:
    """Text and tokenizer, either from the settings of a run or from the arguments."""
    from relora_mora.config.load import FINETUNING, READING, load_config, parse_typed, read_data

    if source.endswith((".yaml", ".yml")) or (find_config(source) != Path(source) and not Path(source).is_dir()):
        paths = {} if tokenizer is None else {"tokenizer.path": json.dumps(tokenizer, ensure_ascii=False)}
        config = load_config(source, {**overrides, **paths}, defaults=FINETUNING if finetune else None)
        return config.data, config.tokenizer_path
    if finetune:
        raise ValueError(f"--finetune: {source} is not a file of settings (.yaml); leave it out")
    if tokenizer is None:
        raise ValueError(
            "--tokenizer: missing; give the folder or .model file of the run, or settings (.yaml) as the source"
        )
    sources = {"train": "none", "validation": "none"} | {split: parse_typed(source, "SOURCE")}
    return read_data(sources, overrides, READING | {"records"}), tokenizer
