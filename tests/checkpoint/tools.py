"""Small complete checkpoints, and changes to their manifests."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from relora_mora.checkpoint.layout import file_entry
from relora_mora.system.files import write_synced
from tests.tools.checkpoints import made_manifest, rewrite_manifest

STATE = "state-00001-of-00002.safetensors"


FILES = (
    "state-00000-of-00002.safetensors",
    STATE,
    "base-00000-of-00002.safetensors",
    "base-00001-of-00002.safetensors",
    "tokenizer/tokenizer.model",
    "tokenizer/tokenizer_config.json",
    "manifest.json",
)


TOKENIZER = FILES[4:6]


def made_checkpoint(folder: Path, step: int) -> Path:
    """A small complete checkpoint: parameter a [4, 3] in two pieces, b [2]; frozen w [2, 2] and v [3]."""
    (folder / "tokenizer").mkdir(parents=True)
    draw = torch.Generator().manual_seed(step)
    sizes = {FILES[0]: [("a", 0, 7)], FILES[1]: [("a", 7, 5), ("b", 0, 2)]}
    for file, pieces in sizes.items():
        kinds = ("master", "exp_avg", "exp_avg_sq")
        save_file(
            {f"{kind}|{n}|{at}": torch.rand(size, generator=draw) for n, at, size in pieces for kind in kinds},
            folder / file,
        )
    save_file({"base|w|0": torch.rand(2, 2, generator=draw)}, folder / FILES[2])
    save_file({"base|v|0": torch.rand(3, generator=draw)}, folder / FILES[3])
    (folder / FILES[4]).write_bytes(b"pieces")
    (folder / FILES[5]).write_text("{}")
    manifest = made_manifest(
        step=step,
        operator=1,
        world_size=2,
        group_steps={"adapters": step},
        parameters={"a": [4, 3], "b": [2]},
        frozen={"w": [2, 2], "v": [3]},
        config={"optim": {"lr": 1e-05, "clip": 1.0, "matrices": "adamw"}},
        model_config={"hidden_size": 4},
        tokenizer_fingerprint="größe",
        data_content="text",
        data_state={"0": {"row": 3}},
        counters={"tokens": 1},
        files={name: file_entry(folder / name) for name in FILES[:-1]},
    )
    write_synced(folder / "manifest.json", manifest.dump())
    return folder


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Writes a manifest with other values and the right checksums of all files."""

    def changed(values: dict[str, Any]) -> None:
        change(values)
        for name in [name for name in values.get("files", ()) if (checkpoint / name).is_file()]:
            values["files"][name] |= dataclasses.asdict(file_entry(checkpoint / name))

    rewrite_manifest(checkpoint, changed)


def change_state(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the tensors of a rank, with the right checksum."""
    tensors = load_file(checkpoint / STATE)
    change(tensors)
    save_file(tensors, checkpoint / STATE)
    rewrite(checkpoint, lambda values: None)
