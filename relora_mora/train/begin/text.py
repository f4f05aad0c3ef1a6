"""Opens the tokenizer and the text of a run. Reports everything that is missing at once."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from relora_mora.config.data import Split, set_setting
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config
from relora_mora.data.content import content_of
from relora_mora.data.errors import SourceError
from relora_mora.data.first_rows import check_columns, check_records
from relora_mora.data.records.passages import template_in_use
from relora_mora.data.shard import Shard
from relora_mora.data.sources import configured_shards, split_remark
from relora_mora.data.tokens.make import check_tokens
from relora_mora.system.logs import log
from relora_mora.tokenizer.files import TokenizerError
from relora_mora.tokenizer.load import load_tokenizer

T = TypeVar("T")
_DEMO = "runs/demo/"  # what shipped settings such as tiny_remora read


@dataclass(frozen=True)
class Text:
    tokenizer: PreTrainedTokenizerBase
    shards: list[Shard]  # of the training data
    chat_template: str | None  # that of its first conversations; the run's tokenizer gets it


def open_text(config: Config) -> Text:
    """Loads the tokenizer and finds the shards of training and validation.

    Raises TokenizerError or SourceError if one of them cannot be used, and ConfigError for several.
    """
    errors: list[tuple[str, TokenizerError | SourceError]] = []
    tokenizer = _attempt(errors, "tokenizer.path", lambda: load_tokenizer(config.tokenizer_path))
    shards = _attempt(errors, "data.train", lambda: _shards(config, "train", tokenizer))
    template = template_in_use(shards, tokenizer) if shards and tokenizer else None
    run_tokenizer = copy(tokenizer)
    if run_tokenizer is not None and template is not None:
        run_tokenizer.chat_template = template
    for name, sources in config.data.validation.items():
        data = config.data.model_copy(update={"validation": {"": sources}})
        one_set = config.model_copy(update={"data": data})
        _attempt(errors, set_setting(name), partial(_shards, one_set, "validation", run_tokenizer))
    if tokenizer is None or shards is None or errors:
        raise _combined_error(errors)
    if remark := split_remark(shards, config.data):
        log.info(remark)
    return Text(tokenizer, shards, template)


def _shards(config: Config, split: Split, tokenizer: PreTrainedTokenizerBase | None) -> list[Shard]:
    data = config.data
    shards = configured_shards(data, split)
    check_columns([shard for shard in shards if not shard.is_remote], data)
    if tokenizer is not None:
        check_records([shard for shard in shards if not shard.is_remote], data, tokenizer)
        check_tokens(shards, tokenizer_path=config.tokenizer_path, eos=tokenizer.eos_token_id)
    if split == "validation":
        content_of(shards)  # raises SourceError for damaged tokens
    return shards


def _attempt(errors: list[tuple[str, TokenizerError | SourceError]], setting: str, action: Callable[[], T]) -> T | None:
    try:
        return action()
    except (TokenizerError, SourceError) as error:
        errors.append((setting, error))
        return None


def _combined_error(errors: list[tuple[str, TokenizerError | SourceError]]) -> ValueError:
    """The error itself, or one error with the setting of each if there are several, if one is of a named set, or if
    files of the demo are missing; it then also says what creates them."""
    [setting, error], *others = errors
    if not others and setting.count(".") == 1 and _DEMO not in str(error):
        return error
    faults = []
    for setting, error in errors:
        fault = f"{setting}: {error}"
        if _DEMO in fault:
            here = "" if str(Path.cwd()) in fault else f", {Path.cwd()}"
            fault += f" (relora-mora demo creates it in the current folder{here})"
        faults.append(fault)
    return ConfigError(faults, "the settings")
