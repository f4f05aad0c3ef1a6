"""Finds the files of a run that this host lacks. It needs no torch, so they are named within a second."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from relora_mora.config.data import set_setting
from relora_mora.config.load import ConfigError, read_json
from relora_mora.config.schema import Config
from relora_mora.data.errors import SourceError
from relora_mora.data.named_sets import is_on_disk
from relora_mora.data.sources import shards_of
from relora_mora.tokenizer.files import TokenizerError, check_exists

START_REMEDY = "give the folder of a causal language model (`hf download REPO --local-dir DIR` fetches one) or a run"
_DEMO = "runs/demo/"  # what shipped settings such as tiny_remora read


def check_files(config: Config) -> None:
    """Raises :class:`ConfigError` with all files that the settings name and this host lacks. Asks no server."""
    remedy = f" (relora-mora demo creates it in the current folder, {Path.cwd()})"
    faults = [fault + remedy * (_DEMO in fault) for check in _checks(config) for fault in _faults(*check)]
    if faults:
        raise ConfigError(faults, "the settings")


def check_start_exists(start: Path) -> None:
    """Raises :class:`ConfigError` if there is nothing at ``model.init_from``."""
    if not start.exists():
        raise ConfigError([f"model.init_from: {start} does not exist; {START_REMEDY}"], "the settings")


def _checks(config: Config) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What must be there: the setting, and a function that raises if it is not."""
    model, data = config.model, config.data
    if model.config is not None:
        yield "model.config", partial(read_json, Path(model.config), "model.config")
    if model.init_from is not None:
        yield "model.init_from", partial(check_start_exists, Path(model.init_from))
    if config.tokenizer.path is not None:
        yield "tokenizer.path", partial(check_exists, Path(config.tokenizer.path))
    for source in filter(is_on_disk, data.train):
        yield "data.train", partial(shards_of, [source], data, "train")
    for name, sources in data.validation.items():
        for source in filter(is_on_disk, sources):
            yield set_setting(name), partial(shards_of, [source], data, "validation")


def _faults(setting: str, check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except ConfigError as error:
        return error.faults
    except (SourceError, TokenizerError) as error:
        return [f"{setting}: {error}"]
    return []
