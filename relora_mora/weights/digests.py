"""What a run began with, as digests: other weights or text under the same name are noticed, without reading all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from relora_mora.config.data import Split
from relora_mora.config.schema import Config, ModelConfig
from relora_mora.data.content import local_content, samples_digest
from relora_mora.data.errors import SourceError
from relora_mora.data.sources.resolve import configured_shards
from relora_mora.system.run_folder import RunFolder, noted_digests, read_json_lines
from relora_mora.tokenizer.folder import TokenizerError
from relora_mora.tokenizer.identity import tokenizer_fingerprint

FILES = ("manifest.json", "config.json", "adapter_config.json", "*.safetensors", "*.bin")  # of a model or an adapter
CHANGED = {  # by setting, what is said where its digest is another one
    "model.config": "another model than model.config describes now",
    "model.init_from": "other weights than model.init_from holds now",
    "model.adapter": "other weights than model.adapter holds now",
    "tokenizer.path": "another tokenizer than tokenizer.path holds now",
    "data.train": "other text than data.train holds now",
    "data.validation": "other text than data.validation holds now",
}

ABSENT = {name: f"no {name}" for name in ("model.init_from", "model.adapter")}  # where a run began without


def start_digests(config: Config) -> dict[str, str]:
    """Those of :func:`model_digests`, that of the tokenizer and, of each side, that of the local files of its text.

    By the names in ``CHANGED``. What is not there, or cannot be read, has none.
    """
    digests = model_digests(config.model)
    with contextlib.suppress(TokenizerError, OSError):
        digests["tokenizer.path"] = tokenizer_fingerprint(config.tokenizer_path)
    sides: tuple[Split, ...] = ("train", "validation")
    for side in sides:
        with contextlib.suppress(SourceError):
            digests[f"data.{side}"] = local_content(configured_shards(config.data, side))
    return {name: digest for name, digest in digests.items() if digest}


def model_digests(model: ModelConfig) -> dict[str, str]:
    """32 hex digits for each of ``model.config``, ``model.init_from`` and ``model.adapter`` that names what is there.

    They are over names, sizes and samples of the files that hold a model; of a run, those of its newest checkpoint.
    That of a config is over its content, however it is written.
    """
    given = {"model.init_from": model.init_from, "model.adapter": model.adapter}
    found = {name: _files(Path(path)) for name, path in given.items() if path is not None}
    digests = {name: _digest(files) for name, files in found.items() if files}
    if model.config is not None:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(Path(model.config).read_text(encoding="utf-8"))
            digests["model.config"] = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return digests


def starts_of(run: Path) -> list[dict[str, Any]]:
    """The lines of its ``starts.jsonl``; none where it is not there, or was cut off where the disk was full."""
    try:
        return read_json_lines(RunFolder(run).starts)
    except (OSError, ValueError):
        return []


def changed_start(noted: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """In words, what is not as it was when a run began with it; None where nothing is known to be.

    ``noted`` is what :func:`relora_mora.system.run_folder.noted_digests` gives: earlier versions noted
    less. Of what is not there any more there is no digest ``now``.
    """
    changed = [CHANGED[name] for name, digest in noted.items() if now.get(name, digest) != digest]
    return " and ".join(changed) or None


def other_weights(checkpoint: Path, model: ModelConfig) -> dict[str, str]:
    """By setting, in words, what the run of a checkpoint began with, where ``model`` names other weights.

    Empty where that run noted nothing, as an earlier version began it, or another run's checkpoint, and where the
    weights cannot be read now. Files are compared: a model that was saved again is another one, and a run that went on.
    """
    noted = noted_digests(starts_of(checkpoint.absolute().parent.parent))
    now: dict[str, str] = {}
    with contextlib.suppress(SourceError, OSError):
        now = model_digests(model.model_copy(update={"config": None})) if noted else {}
    return {
        name: CHANGED[name] if name in noted else ABSENT[name]
        for name, digest in now.items()
        if noted.get(name) != digest
    }


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
