"""Folders written by ``save_to_disk`` of ``datasets``, which say in files of their own what is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

from relora_mora.data.datasets_folder import missing_split
from relora_mora.data.errors import SourceError
from relora_mora.data.hub_sources import DatasetName

_SPLITS = "dataset_dict.json"
_STATE = "state.json"


def saved_files(name: DatasetName, split: str, paths: Collection[str], read: Callable[[str], str]) -> list[str] | None:
    """The files of the split that is named, else of ``split``, in order; None where ``paths`` are not of such a folder.

    ``read`` gives the text of a file.
    A single set without a split's name is ``train``, as everywhere in ``datasets``. Raises SourceError.
    """
    source = name.source
    split = name.split or split
    if _SPLITS in paths:
        splits = _read(source, _SPLITS, read)
        folders = {part: f"{part}/" for part in splits.get("splits", ())}
    elif _STATE in paths:
        state = _read(source, _STATE, read)
        if "_data_files" not in state:
            return None
        named = re.match(r"\w+", state.get("_split") or "train")  # of train[:10%] the name
        folders = {named[0] if named else "train": ""}
    else:
        return None
    if split not in folders:
        raise missing_split(name, split, folders)
    folder = folders[split]
    state = _read(source, folder + _STATE, read) if folder + _STATE in paths else {}
    if state.get("_data_files") == []:
        raise SourceError(f"{source}: its split {split} has no rows (save_to_disk); give a set or a split with some")
    files = [f"{folder}{entry['filename']}" for entry in state.get("_data_files", ())]
    missing = [file for file in files if file not in paths]
    if missing or not files:
        raise SourceError(
            f"{source} was written by save_to_disk, and {missing[0] if missing else folder + _STATE} is missing or "
            "names no files; copy or write the whole folder again"
        )
    return files


def _read(source: str, path: str, read: Callable[[str], str]) -> dict[str, Any]:
    try:
        content = json.loads(read(path))
    except ValueError as error:
        if isinstance(error, SourceError):
            raise
        content = None
    if not isinstance(content, dict):
        raise SourceError(f"{source}: {path} is no object in JSON; write the set again, or give its files by path")
    return content
