"""Digests of a run's inputs, from samples: they show if other weights or text have the same name now."""

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
from relora_mora.tokenizer.files import TokenizerError
from relora_mora.tokenizer.identity import tokenizer_fingerprint

FILES = ("manifest.json", "config.json", "adapter_config.json", "*.safetensors", "*.bin")  # of a model or an adapter
CHANGED = {  # by setting, how messages describe that its digest has changed
    "model.config": "another model than model.config describes now",
    "model.init_from": "other weights than model.init_from holds now",
    "model.adapter": "other weights than model.adapter holds now",
    "tokenizer.path": "another tokenizer than tokenizer.path holds now",
    "data.train": "other text than data.train holds now",
    "data.validation": "other text than data.validation holds now",
}

ABSENT = {name: f"no {name}" for name in ("model.init_from", "model.adapter")}  # for a run that began without it


def start_digests(config: Config) -> dict[str, str]:
    """The digests of model, tokenizer, and local training and validation text, by the names in ``CHANGED``.

    Files that do not exist or cannot be read have no digest.
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
    """32 hex digits for each of ``model.config``, ``model.init_from`` and ``model.adapter`` that exists.

    They cover names, sizes and samples of the files of a model; for a run, the files of its newest checkpoint. The
    digest of a config covers its content and not its formatting.
    """
    paths = {"model.init_from": model.init_from, "model.adapter": model.adapter}
    found = {name: _digest(Path(path)) for name, path in paths.items() if path is not None}
    digests = {name: digest for name, digest in found.items() if digest is not None}
    if model.config is not None:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(Path(model.config).read_text(encoding="utf-8"))
            digests["model.config"] = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return digests


def starts_of(run: Path) -> list[dict[str, Any]]:
    """The lines of its ``starts.jsonl``; none if the file does not exist, or was cut off by a full disk."""
    try:
        return read_json_lines(RunFolder(run).starts)
    except (OSError, ValueError):
        return []


def changed_start(noted: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Describes the inputs that have changed since a run began with them; None if no change is known.

    ``noted`` is from :func:`relora_mora.system.run_folder.noted_digests`. Files that no longer exist have no digest in
    ``now``.
    """
    changed = [CHANGED[name] for name, digest in noted.items() if now.get(name, digest) != digest]
    return " and ".join(changed) or None


def other_weights(checkpoint: Path, model: ModelConfig) -> dict[str, str]:
    """Describes, by setting, what the run of a checkpoint began with if ``model`` names other weights now.

    Empty if that run recorded nothing, because another run's checkpoint started it, and if the weights cannot be read
    now. Files are compared, so a model that was saved again differs, and a run that has trained on.
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


def _digest(path: Path) -> str | None:
    """The digest of the model or adapter in a folder, or of the newest checkpoint in it; None if there is none."""
    checkpoints = [
        each for folder in (path, RunFolder(path).checkpoints) for each in sorted(folder.glob("step-*[0-9]"))[::-1]
    ]
    for folder in (path, *checkpoints):
        files = [file for pattern in FILES for file in sorted(folder.glob(pattern))]
        if files:
            samples = "".join(f"{file.name} {samples_digest(str(file))}\n" for file in files)
            return xxhash.xxh3_128_hexdigest(samples.encode())
    return None
