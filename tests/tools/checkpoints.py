"""Checkpoints of runs that were never made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from relora_mora.checkpoint.layout import Manifest, content_checksum, file_entry
from relora_mora.system.files import write_synced
from relora_mora.tokenizer.identity import save_tokenizer, tokenizer_fingerprint
from tests.tools.commands import left_in
from tests.tools.runs import run_config

STATE = "state-00000-of-00001.safetensors"
BASE = "base-00000-of-00001.safetensors"


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the values of a manifest and gives it the right checksum, as a stranger or another version could."""
    path = checkpoint / "manifest.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    change(values)
    path.write_text(json.dumps(values | {"checksum": content_checksum(values)}))


def made_manifest(**values: Any) -> Manifest:
    """The manifest of a run on one rank at step 5, with other values where given."""
    plain: dict[str, Any] = {
        "step": 5,
        "merges_done": 0,
        "operator": None,
        "world_size": 1,
        "zero_stage": 2,
        "bf16": False,
        "group_steps": {},
        "config": {},
        "model_config": {},
        "tokenizer_fingerprint": "",
        "data_content": "",
        "data_order": "",
        "data_state": {},
        "eos_token_id": 2,
        "matrix_states": {},
        "counters": {},
        "files": {},
    }
    return Manifest(**(plain | values))


def write_checkpoint(
    folder: Path,
    lm: LlamaForCausalLM,
    tokenizer: str | Path,
    *,
    operator: int | None = None,
    merges_done: int = 0,
    **sections: dict[str, Any],
) -> Path:
    """A checkpoint at step 5 with these weights, of a run of full rank if no section says otherwise."""
    save_tokenizer(tokenizer, folder / "tokenizer")
    trained = {name: value.detach().flatten() for name, value in lm.named_parameters() if value.requires_grad}
    frozen = {name: value.detach().flatten() for name, value in lm.named_parameters() if not value.requires_grad}
    kinds = ("master", "exp_avg", "exp_avg_sq")
    save_file({f"{kind}|{n}|0": v.clone() for n, v in trained.items() for kind in kinds}, folder / STATE)
    save_file({f"base|{name}|0": value.clone() for name, value in frozen.items()}, folder / BASE)
    names = [STATE, BASE, *(f"tokenizer/{name}" for name in left_in(folder / "tokenizer"))]
    config = run_config(folder, str(tokenizer), folder, **({"method": {"name": "full"}} | sections))
    manifest = made_manifest(
        merges_done=merges_done,
        operator=operator,
        parameters={name: list(lm.get_parameter(name).shape) for name in trained},
        frozen={name: list(lm.get_parameter(name).shape) for name in frozen},
        config=config.model_dump(mode="json"),
        model_config={key: value for key, value in lm.config.to_dict().items() if key != "architectures"}
        | {"use_cache": False},
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        files={name: file_entry(folder / name) for name in names},
    )
    write_synced(folder / "manifest.json", manifest.dump())
    return folder
