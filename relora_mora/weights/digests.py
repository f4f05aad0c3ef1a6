"""Digests of the weights that a run begins with, from samples: they show if other weights have the same name now."""

import contextlib
import json
from pathlib import Path

import xxhash

from relora_mora.checkpoint.layout import list_checkpoints
from relora_mora.config.schema import ModelConfig
from relora_mora.data.content import samples_digest
from relora_mora.data.errors import SourceError
from relora_mora.system.run_folder import RunFolder, noted_digests, read_json_lines

FILES = ("manifest.json", "config.json", "adapter_config.json", "*.safetensors", "*.bin")  # of a model or an adapter


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


def other_weights(checkpoint: Path, model: ModelConfig) -> dict[str, str]:
    """Describes, by setting, what the run of a checkpoint began with if ``model`` names other weights now.

    Empty if that run recorded nothing, because another run's checkpoint started it, and if the weights cannot be read
    now. Files are compared, so a model that was saved again differs, and a run that has trained on.
    """
    noted: dict[str, str] = {}
    now: dict[str, str] = {}
    with contextlib.suppress(SourceError, OSError, ValueError):
        noted = noted_digests(read_json_lines(RunFolder.of(checkpoint).starts))
        now = model_digests(model.model_copy(update={"config": None})) if noted else {}
    return {
        name: f"other weights than {name} holds now" if name in noted else f"no {name}"
        for name, digest in now.items()
        if noted.get(name) != digest
    }


def _digest(path: Path) -> str | None:
    """The digest of the model or adapter in a folder, or of the newest checkpoint in it; None if there is none."""
    for folder in (path, *list_checkpoints(path), *list_checkpoints(RunFolder(path).checkpoints)):
        files = [file for pattern in FILES for file in sorted(folder.glob(pattern))]
        if files:
            samples = "".join(f"{file.name} {samples_digest(str(file))}\n" for file in files)
            return xxhash.xxh3_128_hexdigest(samples.encode())
    return None
