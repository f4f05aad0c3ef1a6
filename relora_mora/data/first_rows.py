"""The first rows of a run's data: that they fit the settings and can be learned from, and how they are tokenized."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

from relora_mora.config.data import DataConfig
from relora_mora.config.schema import Config
from relora_mora.data.content import THREADS
from relora_mora.data.errors import SourceError
from relora_mora.data.lanes import Cursor, lane_parts
from relora_mora.data.read import open_rows, rows_in_order
from relora_mora.data.records.encoders import packing_of
from relora_mora.data.rows import FEWEST_ROWS, Ids, RecordsFound, Scored
from relora_mora.data.shard import TEXT, Shard
from relora_mora.data.sources import configured_shards
from relora_mora.data.stream.lane import Lane
from relora_mora.data.stream.packing import scored_mask
from relora_mora.data.stream.producer import mixture_names, shards_of_source
from relora_mora.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_ROWS = 1000
_FIRST_ROWS = 16
_CHARACTERS = 1 << 22  # at most this many are tokenized, which takes a second or two
_GREEN = "\x1b[32m"
_PLAIN = "\x1b[0m"


def check_columns(shards: Sequence[Shard], config: DataConfig) -> None:
    """Reads the first rows of one file of each folder and format, for mistakes that concern whole files.

    Such a file lacks the columns that are read, is one JSON array, or begins with bad rows only. Raises SourceError.
    """
    samples = {
        (shard.location.rpartition("/")[0], shard.format, tuple(shard.columns)): shard
        for shard in sorted(shards, key=lambda shard: shard.size or 0)  # the largest, since some may be empty
        if not shard.tokens and shard.format is not TEXT
    }

    def check(shard: Shard) -> None:
        with closing(open_rows(config, shard, note=_ignore)) as rows:
            first = rows.take(_FIRST_ROWS)
            if len(first) < _FIRST_ROWS:
                rows.take(1)  # reaches the end, where the file is checked as a whole
            if rows.bad == len(first) > config.max_bad_fraction * len(first):
                raise rows.fault()

    with ThreadPoolExecutor(THREADS) as threads:  # they mostly wait for servers, and a set may have many folders
        list(threads.map(check, samples.values()))


def check_records(shards: Sequence[Shard], config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Tokenizes the first rows of each source of records, or of whole texts, and checks them as a run does.

    These are 1,000 rows, or fewer if they are long; from a server, only rows of the first file. Raises SourceError if
    the tokenizer or the template cannot be used, if too many rows or all of them cannot be used, or if there are none.
    """
    for _, of_source in itertools.groupby(shards, lambda shard: (shard.source, shard.records)):
        group = [shard for shard in of_source if shard.tokens is None]
        packing = packing_of(config, group)
        if not group or (packing == "stream" and group[0].records.is_text):
            continue
        found = RecordsFound(config, _ignore)
        checked = group[:1] if group[0].is_remote else group
        for _ in rows_in_order(checked, config, tokenizer, packing, found, limit=_first):
            pass
        if not (found.usable or found.left_out) and checked is group:
            raise SourceError(f"{group[0].label}: holds no record; give a file with at least one")


def _first(rows: Iterator[Any]) -> Iterator[Any]:
    characters = 0
    for row in itertools.islice(rows, FEWEST_ROWS):
        yield row
        characters += len(row)
        if characters >= _CHARACTERS:
            break


def check_lanes(shards: Sequence[Shard], config: DataConfig, lanes: int) -> None:
    """Reads the first text of every lane, of a mixture in each source that ever has a weight; call it on one rank.

    A lane without text would only be noticed when the model is built, or when its source is first used, perhaps days
    into the run. Text with a file for each lane is left to the first batch. Raises SourceError.
    """
    one_row = config.model_copy(update={"shuffle_documents": 1})
    weights = [{source.label: source.weight for source in config.train}, *(stage.weights for stage in config.stages)]
    for name in mixture_names(config):
        own = shards_of_source(shards, config, name)
        is_read = any(each[name] for each in weights) if config.is_mixture else len(own) < lanes
        if is_read and packing_of(config, own) == "stream":
            parts = lane_parts(config, lanes, len(own))
            opened = [Lane(lane, parts[lane], own, one_row, lambda shard: list, eos=0) for lane in range(lanes)]
            with ThreadPoolExecutor(THREADS) as threads:  # they mostly wait for servers
                list(threads.map(_read_first, opened))


def _read_first(lane: Lane) -> None:
    with closing(lane.rows(Cursor())) as rows:
        next(rows)


def _ignore(note: str) -> None:
    """Skipped rows are reported when the run reads them."""


def show_records(config: Config, count: int) -> None:
    """Prints the first ``count`` rows of each source of the training data, and the share of scored tokens.

    Tokens are separated by ``·``; those that are scored are green on a terminal, else in brackets. Raises SourceError
    and TokenizerError.
    """
    tokenizer = load_tokenizer(config.tokenizer_path)
    shards = configured_shards(config.data, "train")
    check_columns(shards, config.data)
    check_records(shards, config.data, tokenizer)
    for source, of_source in itertools.groupby(shards, lambda shard: shard.source):
        _show_source(source, list(of_source), config.data, tokenizer, count)


def _show_source(
    source: str, shards: Sequence[Shard], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", count: int
) -> None:
    packing = packing_of(config, shards)
    end = [int(tokenizer.eos_token_id)] if packing == "stream" else []  # type: ignore[arg-type]
    scored = tokens = rows = 0
    found = RecordsFound(config)
    for row in itertools.islice(rows_in_order(shards, config, tokenizer, packing, found), max(count, SAMPLE_ROWS)):
        rows += 1
        mask = scored_mask(row, packing)
        scored += int(mask.sum())
        tokens += len(mask)
        if rows <= count:
            name = f" of {source}" if source else ""
            cut = ", cut" if row.cut else ""
            text = marked(tokenizer, [*row.ids, *end], mask, colour=sys.stdout.isatty())
            sys.stdout.write(f"--- row {rows}{name}: {mask.sum()} of {len(mask)} tokens scored{cut}\n{text}\n")
    if not rows:
        raise SourceError(f"the training data {source or shards[0].label} holds no text; give a file with at least one")
    name = f"{source}: " if source else ""
    without = f"; left out: {found}" if found.left_out else ""
    share = f"{scored / max(1, tokens):.1%} of {tokens:,} tokens are scored"
    sys.stdout.write(f"{name}{share} (the first {rows:,} rows{without})\n")


def marked(tokenizer: "PreTrainedTokenizerBase", ids: Ids, scored: Scored, *, colour: bool) -> str:
    """The text of each token, with scored tokens marked; line breaks are both shown and kept."""
    begin, end = (_GREEN, _PLAIN) if colour else ("[", "]")
    parts = []
    for is_scored, run in itertools.groupby(zip(ids, scored, strict=True), lambda pair: bool(pair[1])):
        texts = "·".join(str(tokenizer.decode([int(token)])).replace("\n", "\\n\n") for token, _ in run)
        parts.append(f"{begin}{texts}{end}" if is_scored else texts)
    return "·".join(parts)
