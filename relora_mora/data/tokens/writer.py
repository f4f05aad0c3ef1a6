"""Tokenizes one shard of text or records into a file, in bounded memory. The file appears only once it is complete."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from relora_mora.config.data import DataConfig
from relora_mora.data.content import samples_digest
from relora_mora.data.errors import BAD_REASONS, Skipped
from relora_mora.data.read import open_rows
from relora_mora.data.rows import Encode, Encoded, JudgedRows, RecordsFound, in_calls
from relora_mora.data.shard import Shard
from relora_mora.data.tokens.index import FileStats
from relora_mora.data.tokens.rows import MappedTokens
from relora_mora.system.files import disk_faults_named, sync

# limits of a record batch; a lane that reads rows maps one batch at a time
BATCH_TOKENS = 1 << 22
BATCH_ROWS = 1 << 16
UNFINISHED = ".tmp"  # suffix of a file that is being written
TEXTS_PER_CALL = 256  # per tokenizer call; enough to keep several cores of one process busy


class TokenWriter:
    """``write(row, utf8_bytes)`` adds a row: its tokens, or the reason why it was skipped."""

    def __init__(self, stream: Any, vocabulary: int, *, records: bool = False) -> None:
        import pyarrow

        ids = pyarrow.uint16() if vocabulary <= 1 << 16 else pyarrow.uint32()
        columns = [("tokens", pyarrow.list_(ids)), ("utf8_bytes", pyarrow.int64()), ("skipped", pyarrow.string())]
        if records:
            columns.append(("scored", pyarrow.list_(pyarrow.uint8())))
        self._schema = pyarrow.schema(columns)
        self._ids = ids.to_pandas_dtype()
        self._file = pyarrow.ipc.new_file(stream, self._schema)
        self._clear()

    def write(self, row: Encoded | Skipped, utf8_bytes: int = 0) -> None:
        ids, scored, *_ = Encoded([]) if isinstance(row, Skipped) else row
        self._rows.append(np.array(ids, self._ids))
        self._scored.append(np.ones(len(ids), np.uint8) if scored is None else np.array(scored, np.uint8))
        self._ends.append(self._ends[-1] + len(ids))
        self._sizes.append(utf8_bytes)
        self._skipped.append(row.reason if isinstance(row, Skipped) else None)
        if self._ends[-1] >= BATCH_TOKENS or len(self._rows) >= BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _clear(self) -> None:
        self._rows: list[Any] = []
        self._scored: list[Any] = []
        self._ends = [0]
        self._sizes: list[int] = []
        self._skipped: list[str | None] = []

    def _flush(self) -> None:
        import pyarrow

        if not self._rows:
            return
        ends = pyarrow.array(self._ends, pyarrow.int32())
        columns = [
            pyarrow.ListArray.from_arrays(ends, pyarrow.array(np.concatenate(self._rows))),
            pyarrow.array(self._sizes, pyarrow.int64()),
            pyarrow.array(self._skipped, pyarrow.string()),
            pyarrow.ListArray.from_arrays(ends, pyarrow.array(np.concatenate(self._scored))),
        ]
        self._file.write_batch(pyarrow.record_batch(columns[: len(self._schema)], schema=self._schema))
        self._clear()


def write_tokens(
    path: Path,
    shard: Shard,
    *,
    config: DataConfig,
    encode: Encode[Any],
    vocabulary: int,
    threads: int = 1,
    progress: Callable[[float], object] = lambda part: None,
) -> FileStats:
    """Tokenizes a shard. ``vocabulary``: the largest id plus one. ``threads``: the tokenizer's threads.

    ``progress`` is called with the fraction of the shard that has been read. Only the limits of ``config`` matter.
    Raises SourceError for text that cannot be read or has too many bad rows, OSError for a disk that cannot be written.
    """
    found = RecordsFound(config)
    with _replacing(path) as unfinished, closing(open_rows(config, shard)) as opened, unfinished.open("wb") as stream:
        assert isinstance(opened, JudgedRows), "tokens of tokens"
        writer = TokenWriter(stream, vocabulary, records=shard.holds_records)
        taken = itertools.chain.from_iterable(iter(lambda: opened.take(TEXTS_PER_CALL), []))
        for rows in in_calls(taken, TEXTS_PER_CALL, lambda row: 0 if isinstance(row, Skipped) else len(row), threads):
            encoded = iter(encode([row for row in rows if not isinstance(row, Skipped)]))
            for row in rows:
                if isinstance(row, Skipped):
                    writer.write(row)
                    continue
                made = next(encoded)
                found.add(made)
                writer.write(made, len(row.encode()) if isinstance(row, str) else 0)
            progress(opened.progress)
        writer.close()
        stream.flush()
        os.fsync(stream.fileno())
    return totals_of(path)


def totals_of(path: Path) -> FileStats:
    """The totals of a file of tokens. Raises SourceError if it is damaged."""
    with closing(MappedTokens(str(path))) as tokens:
        batches = [*tokens.batches()]
        documents = tokens.rows - sum(len(batch.skipped) for batch in batches)
        return FileStats(
            rows=tokens.rows,
            documents=documents,
            bad=sum(reason in BAD_REASONS for batch in batches for reason in batch.skipped.values()),
            tokens=sum(len(batch.ids) for batch in batches) + documents,
            utf8_bytes=sum(int(batch.utf8_bytes.sum()) for batch in batches),
            digest=samples_digest(str(path)),
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, and renames it to ``path`` if the block ends without an error."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with disk_faults_named(path.parent):
        yield unfinished
        unfinished.replace(path)
        sync(path.parent)
