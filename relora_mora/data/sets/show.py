"""Checks the first rows before a run: that they fit the settings and can be learned from. Also shows them."""

import functools
import itertools
import logging
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from relora_mora.config.data import DataConfig
from relora_mora.config.schema import Config
from relora_mora.data.bad_rows import FEWEST_ROWS, OTHER_KEYS, TOO_LONG, RecordsFound, skip_reason
from relora_mora.data.content import THREADS
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError
from relora_mora.data.lanes import Cursor, LanePlan, LaneRows, lane_plans
from relora_mora.data.read import open_rows
from relora_mora.data.records.encoders import encoder_of, packing_of
from relora_mora.data.rows import Ids, Scored, calls_of
from relora_mora.data.sets.reading import rows_in_order
from relora_mora.data.shard import JSON_LINES, TEXT, Shard
from relora_mora.data.sources.resolve import configured_shards
from relora_mora.data.stream.packing import with_end
from relora_mora.data.stream.producer import mixture_names, shards_of_source
from relora_mora.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SAMPLE_ROWS = 1000
_FIRST_LINES = 16
_ROWS_PER_CALL = 64
_CHARACTERS = 1 << 22  # at most this many are tokenized, which takes a second or two
_GREEN = "\x1b[32m"
_PLAIN = "\x1b[0m"


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
    encode = encoder_of(tokenizer, [shards[0].records], packing_of(config, shards), config.sequence_length)
    checked = shards[:1] if shards[0].is_remote else shards
    counts = RecordsFound()
    characters = 0
    whole = len(checked) == len(shards)
    with closing(_readable_rows(checked, config)) as groups:
        for group in groups:
            if counts.seen >= FEWEST_ROWS or characters >= _CHARACTERS:
                whole = False
                break
            for row in encode(group):
                counts.add(row)
            characters += sum(map(len, group))
    if whole and not counts.seen:
        raise SourceError(f"{shards[0].label}: holds no record; give a file with at least one")
    if fault := counts.fault(shards[0].label, config.max_bad_fraction):
        raise fault
    if counts.too_long * 2 > counts.seen:
        log.warning(
            "%s: %d of the first %d records are too long and left out, for instance %s; raise data.sequence_length",
            shards[0].label,
            counts.too_long,
            counts.seen,
            counts.examples[TOO_LONG],
        )


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
    plans = lane_plans(config, lanes, len(shards))
    strides = {part.shard: part.stride for plan in plans for part in plan.parts if part.stride > 1}
    in_turn = [shard for shard in strides if not shards[shard].in_ranges]
    one_row = config.model_copy(update={"shuffle_documents": 1})

    def phases(shard: int) -> set[int]:
        return _phases_with_text(shards[shard], config, strides[shard])

    def read_first(plan: LanePlan) -> None:
        with closing(LaneRows(plan, shards, one_row, functools.partial(open_rows, config)).rows_from(Cursor())) as rows:
            next(rows)

    with ThreadPoolExecutor(THREADS) as threads:  # they mostly wait for servers
        with_text = dict(zip(in_turn, threads.map(phases, in_turn), strict=True))
        left = [plan for plan in plans if not any(part.phase in with_text.get(part.shard, ()) for part in plan.parts)]
        list(threads.map(read_first, left))


def _phases_with_text(shard: Shard, config: DataConfig, stride: int) -> set[int]:
    """Which of the lanes that take the rows of a shard in turn get a text. Faster than opening each of many lanes."""
    phases: set[int] = set()
    with closing(open_rows(config, shard, note=_ignore)) as opened:
        for number, row in enumerate(itertools.chain.from_iterable(calls_of(opened, _ROWS_PER_CALL))):
            if not isinstance(row, Skipped):
                phases.add(number % stride)
                if len(phases) == stride:
                    break
    return phases


def _readable_rows(shards: Sequence[Shard], config: DataConfig) -> Generator[list[Any]]:
    """All readable rows, in groups."""
    for shard in shards:
        with closing(open_rows(config, shard, note=_ignore)) as opened:
            for group in calls_of(opened, _ROWS_PER_CALL):
                yield [row for row in group if not isinstance(row, Skipped)]


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
    in_stream = packing == "stream"
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    scored = 0
    tokens = 0
    rows = 0
    counts = RecordsFound()
    in_order = rows_in_order(shards, config, tokenizer, packing, counts)
    for row in itertools.islice(in_order, max(count, SAMPLE_ROWS)):
        rows += 1
        encoded = row
        if in_stream:
            with_mask = None if encoded.scored is None else with_end(encoded.scored)
            encoded = encoded._replace(ids=[*encoded.ids, eos], scored=with_mask)
        mask = np.ones(len(encoded.ids), np.bool_)
        if encoded.scored is not None:
            mask[:] = encoded.scored
        if not in_stream:
            mask[0] = False  # there is no token before it to predict it
        scored += int(mask.sum())
        tokens += len(mask)
        if rows <= count:
            name = f" of {source}" if source else ""
            _print(f"--- row {rows}{name}: {mask.sum()} of {len(mask)} tokens scored{', cut' if encoded.cut else ''}")
            _print(marked(tokenizer, encoded.ids, mask, colour=sys.stdout.isatty()))
    if not rows:
        raise SourceError(f"the training data {source or shards[0].label} holds no text; give a file with at least one")
    name = f"{source}: " if source else ""
    without = "".join(f", {number:,} left out: {reason}" for reason, number in counts.left_out.items())
    _print(f"{name}{scored / max(1, tokens):.1%} of {tokens:,} tokens are scored (the first {rows:,} rows{without})")


def marked(tokenizer: "PreTrainedTokenizerBase", ids: Ids, scored: Scored, *, colour: bool) -> str:
    """The text of each token, with scored tokens marked; line breaks are both shown and kept."""
    begin, end = (_GREEN, _PLAIN) if colour else ("[", "]")
    parts = []
    for is_scored, run in itertools.groupby(zip(ids, scored, strict=True), lambda pair: bool(pair[1])):
        texts = "·".join(str(tokenizer.decode([int(token)])).replace("\n", "\\n\n") for token, _ in run)
        parts.append(f"{begin}{texts}{end}" if is_scored else texts)
    return "·".join(parts)


def _print(text: str) -> None:
    print(text)  # noqa: T201 - printing is the purpose of the command
