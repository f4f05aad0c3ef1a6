"""Makes the tokens of a text once, for runs that read them without a tokenizer: data.train=OUT. See docs/data.md.

    python launch/tokenize_text.py configs/run/remora_130m.yaml tokens/c4

It is not called tokenize.py, which would stand in the way of Python's own module for every command in this folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relora_mora.config import Config

try:
    from relora_mora.cli import run
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None

MOST_PROCESSES = 1024


def main(
    source: str,
    out: str,
    *,
    tokenizer: str | None = None,
    split: str = "train",
    processes: int | None = None,
    text_column: str | None = None,
    sample_by: str | None = None,
    revision: str | None = None,
    max_line_bytes: int | None = None,
    max_bad_fraction: float | None = None,
    timeout_seconds: float | None = None,
    finetune: bool = False,
) -> None:
    """Makes a folder of tokens. Started again, it goes on with what is missing.

    Args:
        source: the settings of a run (.yaml), whose text, tokenizer and limits are taken; or a source of text as
            data.train takes it (a path, a glob, a url, allenai/c4), or a YAML list of them
        out: the folder to write
        tokenizer: folder or .model file; default: that of the settings
        split: train or validation: which text of the settings, or which split of a set by name
        processes: that make tokens at the same time, a shard each; default: one per core
        text_column: as in the settings data.*, and so are the rest
        sample_by: what a document of a .txt file is: line, paragraph or document
        revision: of sources on the hub
        max_line_bytes: a longer line, or text of a row, is counted as bad and skipped
        max_bad_fraction: stop when more than this fraction of a shard's lines is bad
        timeout_seconds: give up on a source that has failed for this long
        finetune: the settings are those of a run of launch/finetune.py, with its defaults
    """
    if split not in ("train", "validation"):
        raise ValueError(f"--split: got {split!r}, expected train or validation")
    if processes is not None and not 1 <= processes <= MOST_PROCESSES:
        raise ValueError(f"--processes: got {processes}, expected 1 to {MOST_PROCESSES}, or leave it out")
    from relora_mora.config import is_mixture
    from relora_mora.data import configured_shards, make_tokens

    started = time.monotonic()
    given = {
        "text_column": text_column,
        "sample_by": sample_by,
        "revision": revision,
        "max_line_bytes": max_line_bytes,
        "max_bad_fraction": max_bad_fraction,
        "timeout_seconds": timeout_seconds,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = _settings(source, tokenizer, given, finetune=finetune)
    data = settings.data
    named = len(data.train_sources) if is_mixture(data.train) else 1
    if (named if split == "train" else len(data.validation_sets)) > 1:
        raise ValueError(
            f"{source}: data.{split} names several sources; make the tokens of each in a folder of its own "
            "(SOURCE OUT --tokenizer=...), and give the folders in their place"
        )
    shards = configured_shards(data, "train" if split == "train" else "validation")
    totals = make_tokens(
        shards,
        Path(out),
        config=data,
        tokenizer_path=settings.tokenizer_path,
        processes=processes or len(os.sched_getaffinity(0)),
    )
    print(
        f"{out}: {totals.tokens:,} tokens of {totals.documents:,} documents ({totals.utf8_bytes:,} bytes) in "
        f"{len(shards):,} files, {time.monotonic() - started:.1f} s"
    )
    if totals.bad:
        print(f"{totals.bad:,} of {totals.rows:,} rows are bad and were skipped")
    print(f"use it with --data.{split}={out}")


def _settings(source: str, tokenizer: str | None, data: dict[str, Any], *, finetune: bool) -> Config:
    """Those of a run, or of a source of text; what has nothing to do with text has any value there."""
    from relora_mora.config import FINETUNING, load_config, parse_typed
    from relora_mora.config.load import validate

    if source.endswith((".yaml", ".yml")):
        given = {f"data.{name}": value for name, value in data.items()}
        if tokenizer is not None:
            given["tokenizer.path"] = tokenizer
        overrides = {name: json.dumps(value, ensure_ascii=False) for name, value in given.items()}
        return load_config(source, overrides, defaults=FINETUNING if finetune else None)
    if tokenizer is None:
        raise ValueError(
            "--tokenizer: missing; give the folder or .model file of the run, or settings (.yaml) as source"
        )
    text = parse_typed(source, "SOURCE")
    tree = {
        "model": {"config": "none"},
        "tokenizer": {"path": tokenizer},
        "data": {"train": text, "validation": text, **data},
        "train": {"run_dir": "none"},
    }
    return validate(tree, "the command line")


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment] # transformers would import it, for seconds and for nothing
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    run(main)
