"""Writes the files that describe a run into its folder."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from relora_mora import __version__
from relora_mora.checkpoint.layout import abandon
from relora_mora.config.load import ConfigError, dump
from relora_mora.model.config import plain_model_config
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.work import meta_model
from relora_mora.system.files import append_synced, disk_faults_named, remove, write_synced
from relora_mora.system.hardware import device_name
from relora_mora.system.logs import log
from relora_mora.system.run_folder import CHANGED, NOTED, RunFolder
from relora_mora.tokenizer.identity import save_tokenizer
from relora_mora.train.begin.identity import changes_since
from relora_mora.train.begin.inputs import Inputs
from relora_mora.train.state.run_state import RunState
from relora_mora.weights.digests import model_digests
from relora_mora.weights.generation import generation_file

APPEAR_SECONDS = 15.0  # for a file that another host has just written
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")


def check_shared(file: Path, content: str) -> None:
    """Raises :class:`ConfigError` if this rank does not see in its run folder what the first rank has written there."""
    deadline = time.monotonic() + APPEAR_SECONDS
    while _content(file) != content:
        if time.monotonic() > deadline:
            fault = f"train.run_dir: {file.parent} is not the folder that the first rank has written to"
            raise ConfigError([f"{fault}; put it on a file system that all hosts share"], "the settings")
        time.sleep(0.2)


def _content(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None


def abandon_records(folder: RunFolder) -> None:
    """Renames the metrics, starts and task scores of a run that was in the folder before and is not continued."""
    for path in (folder.metrics, folder.starts, folder.tasks):
        if path.exists():
            abandon(path)


def write_run_folder(inputs: Inputs, state: RunState) -> None:
    """Writes settings, command, versions, commit, model and tokenizer into the run folder. First rank only.

    A run at step 0 notes the digests of what it begins with, and a resume what has changed since the checkpoint. The
    folder of a finished run stays as it is, because this start trains nothing.
    """
    config = inputs.config
    names = inputs.folder
    if state.loaded is not None and state.step == config.train.steps and state.evaluated == state.step:
        log.info("the run is finished and keeps its settings; relora-mora evaluate scores it on other text")
        return
    names.path.mkdir(parents=True, exist_ok=True)
    with disk_faults_named(names.path):
        start = _start_record(inputs, state.step)
        if state.loaded is None:
            digests = {"tokenizer.path": inputs.tokenizer_fingerprint, "data.train": inputs.data_content}
            start[NOTED] = model_digests(config.model) | digests
        elif changes := [change.text for change in changes_since(state.loaded, inputs.identity)]:
            start[CHANGED] = changes
        write_synced(names.config, dump(config))
        write_synced(names.model_config, json.dumps(plain_model_config(inputs.model_config), indent=2) + "\n")
        generation = generation_file(config.model.init_from)
        if generation is not None:
            write_synced(names.generation_config, generation.read_bytes())
        elif state.loaded is None:
            remove(names.generation_config)  # of an earlier start from another base
        work = names.path / "tokenizer.tmp"
        remove(work)
        save_tokenizer(inputs.tokenizer, work)
        remove(names.tokenizer)  # an earlier start may have had another one, or somebody has changed it
        work.rename(names.tokenizer)
        append_synced(names.starts, json.dumps(start))


def _start_record(inputs: Inputs, step: int) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "epochs": inputs.epochs,
        "warmup_fraction": inputs.warmup_fraction,
        "command": sys.argv,
        "host": socket.gethostname(),
        "world_size": inputs.setup.world_size,
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "bf16": inputs.setup.bf16,
        "parameters": asdict(count_parameters(meta_model(inputs.model_config, inputs.config.method))),
        "python": platform.python_version(),
        "versions": {"relora_mora": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+`` for uncommitted code; None outside one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "setup.cfg").is_file():  # installed, perhaps into an environment inside another repository
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
