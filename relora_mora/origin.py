"""What a run began with, as digests: other weights under the same name are noticed, without reading them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from relora_mora.config import ModelConfig
from relora_mora.data.content import samples_digest
from relora_mora.system.run_folder import RunFolder, read_json_lines

FILES = ("manifest.json", "config.json", "adapter_config.json", "*.safetensors", "*.bin")  # of a model or an adapter
NOTED = "began_with"  # in a line of starts.jsonl


def start_digests(model: ModelConfig) -> dict[str, str]:
    """32 hex digits for each of the settings ``config``, ``init_from`` and ``adapter`` that names what is there.

    They are over names, sizes and samples of the files that hold a model; of a run, those of its newest checkpoint.
    That of a config is over its content, however it is written.
    """
    given = {"init_from": model.init_from, "adapter": model.adapter}
    found = {name: _files(Path(path)) for name, path in given.items() if path is not None}
    digests = {name: _digest(files) for name, files in found.items() if files}
    if model.config is not None:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(Path(model.config).read_text(encoding="utf-8"))
            digests["config"] = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return digests


def starts_of(run: Path) -> list[dict[str, Any]]:
    """The lines of its ``starts.jsonl``; none where it is not there, or was cut off where the disk was full."""
    try:
        return read_json_lines(RunFolder(run).starts)
    except (OSError, ValueError):
        return []


def noted_digests(starts: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What the newest of the starts that read weights noted of them; empty where none did. A resume reads none."""
    noted = [start[NOTED] for start in starts if NOTED in start]
    return noted[-1] if noted else {}


def changed_start(starts: Iterable[Mapping[str, Any]], model: ModelConfig) -> str | None:
    """In words, what is not as it was when a run began with it; None where nothing is known to be.

    ``starts`` is what :func:`starts_of` it gives. Runs of earlier versions noted no digests, and of what is not
    there any more there is none.
    """
    now = start_digests(model)
    for name, digest in noted_digests(starts).items():
        if now.get(name, digest) != digest:
            what = "another model than that" if name == "config" else "other weights than those"
            return f"{what} in {getattr(model, name)} now (model.{name})"
    return None


def _files(path: Path) -> list[Path]:
    checkpoints = [
        each for folder in (path, RunFolder(path).checkpoints) for each in sorted(folder.glob("step-*[0-9]"))[::-1]
    ]
    for folder in (path, *checkpoints):
        files = [file for pattern in FILES for file in sorted(folder.glob(pattern))]
        if files:
            return files
    return []


def _digest(files: list[Path]) -> str:
    seen = "".join(f"{file.name} {samples_digest(str(file))}\n" for file in files)
    return xxhash.xxh3_128_hexdigest(seen.encode())
