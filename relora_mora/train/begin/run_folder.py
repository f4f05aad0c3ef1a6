"""Writes the files that describe a run into its folder."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from relora_mora.checkpoint.layout import list_checkpoints
from relora_mora.config.checks.combinations import OPERATIONAL
from relora_mora.config.load import ConfigError, dump, stored_config
from relora_mora.config.schema import Config
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.model.config import plain_model_config
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.work import meta_model
from relora_mora.system.files import append_synced, disk_faults_named, remove, write_if_possible, write_synced
from relora_mora.system.hardware import device_name
from relora_mora.system.logs import log
from relora_mora.system.run_folder import CHANGED, NOTED, RunFolder
from relora_mora.tokenizer.identity import save_tokenizer
from relora_mora.train.begin.check import ResolvedRun
from relora_mora.train.begin.identity import changed_settings
from relora_mora.weights.digests import model_digests
from relora_mora.weights.generation import generation_file


def check_run_folder(path: Path) -> None:
    """Raises :class:`ConfigError` if the run would overwrite files that are not of a run. First rank only.

    A trainer notes its start and its end, and one that was killed leaves its lock. A folder with checkpoints may have
    been copied from elsewhere.
    """
    folder = RunFolder(path)
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            fault = (
                f"train.run_dir: {place} is a link to a folder that does not exist; mount its disk, or remove the link"
            )
            raise ConfigError([fault], "the settings")
    if any(file.exists() for file in (folder.lock, folder.ends, folder.starts)) or list_checkpoints(folder.checkpoints):
        return
    outputs = (folder.config, folder.model_config, folder.tokenizer, folder.metrics, folder.wandb_id)
    existing = [output.name for output in outputs if output.exists()]
    if existing:
        fault = (
            f"train.run_dir: {path} is not the folder of a run, and a run would overwrite {', '.join(existing)} there; "
            "give a new or empty folder"
        )
        raise ConfigError([fault], "the settings")


def write_run_folder(
    checked: ResolvedRun,
    world_size: int,
    step: int,
    *,
    changed: Sequence[str] | None,
) -> None:
    """Writes settings, command, versions, commit, model and tokenizer into the run folder. First rank only.

    ``changed`` describes what differs from the checkpoint that the run resumes. It is None if there is no checkpoint;
    then the digests of what the run begins with are recorded.
    """
    folder = Path(checked.config.train.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with disk_faults_named(folder):
        start = _start_record(checked, world_size, step)
        if changed is None:
            digests = {"tokenizer.path": checked.tokenizer_fingerprint, "data.train": checked.data_content}
            start[NOTED] = model_digests(checked.config.model) | digests
        elif changed:
            start[CHANGED] = list(changed)
        names = RunFolder(folder)
        write_synced(names.config, dump(checked.config))  # a resume takes the commits of the data from it
        write_synced(names.model_config, json.dumps(plain_model_config(checked.model_config), indent=2) + "\n")
        generation = generation_file(checked.config.model.init_from)
        if generation is not None:
            write_synced(names.generation_config, generation.read_bytes())
        elif changed is None:
            remove(names.generation_config)  # of an earlier start from another base
        work = folder / "tokenizer.tmp"
        remove(work)
        save_tokenizer(checked.tokenizer, work)
        remove(names.tokenizer)  # an earlier start may have had another one, or somebody has changed it
        work.rename(names.tokenizer)
        append_synced(names.starts, json.dumps(start))


def keep_run_folder(config: Config, made_with: Mapping[str, Any]) -> None:
    """Leaves the folder of a finished run unchanged, because this start trains nothing. First rank only.

    ``made_with`` are the settings in the last checkpoint. A warning names the settings that differ in ``config``.
    """
    unused = [name for name in changed_settings(dict(made_with), parse_yaml(dump(config))) if name not in OPERATIONAL]
    if unused:
        log.warning(
            "the run is finished and keeps the settings that it was trained with, ignoring the new %s; "
            "relora-mora evaluate scores it on other text",
            ", ".join(unused),
        )
    names = RunFolder(Path(config.train.run_dir))
    before = stored_config(made_with, str(names.config))
    here = {"run_dir": config.train.run_dir, "resume": config.train.resume}
    # a start that was interrupted before it trained may have left other settings
    settings = dump(before.model_copy(update={"train": before.train.model_copy(update=here)}))
    write_if_possible(names.config, settings, without="it stays as the previous start left it")


def _start_record(checked: ResolvedRun, world_size: int, step: int) -> dict[str, Any]:
    parameters = count_parameters(meta_model(checked.model_config, checked.config.method))
    packages = ("relora_mora", "torch", "deepspeed", "transformers", "safetensors")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "epochs": checked.epochs,
        "warmup_fraction": checked.warmup_fraction,
        "command": sys.argv,
        "host": socket.gethostname(),
        "world_size": world_size,
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "bf16": checked.bf16,
        "parameters": asdict(parameters),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path that is not installed
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+`` for uncommitted code; None outside one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "setup.cfg").is_file():  # installed, perhaps into an environment inside another repository
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "--", "relora_mora", "launch"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty else "")
