"""Opens the tokenizer and the text of a run. Reports everything that is missing at once."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class Text:
    tokenizer: PreTrainedTokenizerBase
    shards: list[Shard]  # of the training data
    chat_template: str | None  # that of its first conversations; the run's tokenizer gets it


def open_text(config: Config) -> Text:
    """Loads the tokenizer and finds the shards of training and validation.

    Raises :class:`ConfigError` with everything that is missing or cannot be used.
    """
    faults: list[str] = []

    def attempt(setting: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except (TokenizerError, SourceError) as error:
            faults.append(f"{setting}: {error}")
            return None

    tokenizer = attempt("tokenizer.path", lambda: load_tokenizer(config.tokenizer_path))
    shards = attempt("data.train", lambda: _shards(config, "train", tokenizer))
    template = template_in_use(shards, tokenizer) if shards and tokenizer else None
    run_tokenizer = copy(tokenizer)
    if run_tokenizer is not None and template is not None:
        run_tokenizer.chat_template = template
    for name, sources in config.data.validation.items():
        data = config.data.model_copy(update={"validation": {"": sources}})
        one_set = config.model_copy(update={"data": data})
        attempt(set_setting(name), partial(_shards, one_set, "validation", run_tokenizer))
    if tokenizer is None or shards is None or faults:
        raise ConfigError(faults, "the settings")
    if remark := split_remark(shards, config.data):
        log.info(remark)
    return Text(tokenizer, shards, template)


def _shards(config: Config, split: Split, tokenizer: PreTrainedTokenizerBase | None) -> list[Shard]:
    data = config.data
    shards = configured_shards(data, split)
    local = [shard for shard in shards if not shard.is_remote]
    check_columns(local, data)
    if tokenizer is not None:
        check_records(local, data, tokenizer)
        check_tokens(shards, tokenizer_path=config.tokenizer_path, eos=tokenizer.eos_token_id)
    if split == "validation":
        content_of(shards)  # raises SourceError for damaged tokens
    return shards
