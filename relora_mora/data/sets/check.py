"""Checks the first rows before a run: that they fit the settings and can be learned from."""

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

from relora_mora.config.data import DataConfig
from relora_mora.data.bad_rows import FEWEST_ROWS, OTHER_KEYS, TOO_LONG, RecordsFound, skip_reason
from relora_mora.data.content import THREADS
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, LanePlan, LaneRows, lane_plans
from relora_mora.data.read import open_rows
from relora_mora.data.records.encoders import packing_of
from relora_mora.data.sets.reading import rows_in_order
from relora_mora.data.shard import JSON_LINES, TEXT, Shard
from relora_mora.data.stream.producer import mixture_names, shards_of_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FIRST_LINES = 16
_CHARACTERS = 1 << 22  # at most this many are tokenized, which takes a second or two


def check_columns(shards: Sequence[Shard], config: DataConfig) -> None:
    """Checks one file of each folder and format, for mistakes that concern whole files.

    Such a file lacks the columns that are read, or is one JSON array; of JSON lines, the first lines are checked.
    Raises SourceError.
    """
    samples = {
        (shard.location.rpartition("/")[0], shard.format, tuple(shard.columns)): shard
        for shard in shards
        if not shard.tokens and shard.format is not TEXT
    }
    for shard in samples.values():
        with closing(open_rows(config, shard, note=_ignore)) as rows:
            if shard.format is not JSON_LINES:
                rows.skip(1)
                continue
            first = rows.take(_FIRST_LINES)
            if len(first) < _FIRST_LINES:
                rows.take(1)  # reaches the end, where the file is checked as a whole
        bad = [row for row in first if isinstance(row, Skipped) and row.reason in BAD_REASONS]
        if bad and len(bad) == len(first):
            hint = f" ({OTHER_KEYS})" if bad[0].reason == "no_text" and not shard.holds_records else ""
            reason = skip_reason(bad[0], shard)
            raise SourceError(f"{shard.label}: none of its first {len(first)} lines can be used; one {reason}{hint}")


def check_records(shards: Sequence[Shard], config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Tokenizes the first rows of each source of records, or of whole texts, and checks them as a run does.

    These are 1,000 rows, or fewer if they are long; from a server, only rows of the first file. Raises SourceError if
    the tokenizer or the template cannot be used, if too many rows or all of them cannot be used, or if there are none.
    Warns if most rows are too long.
    """
    for _, of_source in itertools.groupby(shards, lambda shard: (shard.source, shard.records)):
        group = [shard for shard in of_source if shard.tokens is None]
        if group and (packing_of(config, group) != "stream" or group[0].holds_records):
            _check_rows(group, config, tokenizer)


def _check_rows(shards: Sequence[Shard], config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    counts = RecordsFound()
    checked = shards[:1] if shards[0].is_remote else shards
    packing = packing_of(config, shards)
    for _ in rows_in_order(checked, config, tokenizer, packing, counts, limit=_first, note=_ignore):
        pass
    if not counts.seen and checked is shards:
        raise SourceError(f"{shards[0].label}: holds no record; give a file with at least one")
    too_long = counts.left_out[TOO_LONG]
    if too_long * 2 > counts.seen:
        log.warning(
            "%s: %d of the first %d records are too long and left out, for instance %s; raise data.sequence_length",
            shards[0].label,
            too_long,
            counts.seen,
            counts.examples[TOO_LONG],
        )


def _first(rows: Iterator[Any]) -> Iterator[Any]:
    characters = 0
    for row in itertools.islice(rows, FEWEST_ROWS):
        yield row
        characters += len(row)
        if characters >= _CHARACTERS:
            break


def check_lanes(shards: Sequence[Shard], config: DataConfig, lanes: int) -> None:
    """Reads the first text of every lane in each stream of a mixture that ever has a weight; call it on one rank.

    Without this check, a lane without text would only be noticed when its source is first used, perhaps days into the
    run. Text that is not a mixture needs no check, because the first batch reads every lane. Raises SourceError.
    """
    if not config.is_mixture:
        return
    weights = [{source.label: source.weight for source in config.train}]
    weights += [stage.weights for stage in config.stages]
    for name in mixture_names(config):
        own = shards_of_source(shards, config, name)
        if any(each[name] for each in weights) and packing_of(config, own) == "stream":
            _check_lanes_of(own, config, lanes)


def _check_lanes_of(shards: Sequence[Shard], config: DataConfig, lanes: int) -> None:
    one_row = config.model_copy(update={"shuffle_documents": 1})

    def read_first(plan: LanePlan) -> None:
        rows = LaneRows(plan, shards, one_row, functools.partial(open_rows, config), encode=list)
        with closing(rows.rows_from(Cursor())) as first:
            next(first)

    with ThreadPoolExecutor(THREADS) as threads:  # they mostly wait for servers
        list(threads.map(read_first, lane_plans(config, lanes, len(shards))))


def _ignore(note: str) -> None:
    """Skipped rows are reported when the run reads them."""
