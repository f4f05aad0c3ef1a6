"""Tokenizes shards into a folder, one file per shard, and checks that such tokens fit a run."""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from relora_mora.config.data import DataConfig
from relora_mora.data.columns import MappedTokens
from relora_mora.data.content import contents, samples_digest, with_versions
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError
from relora_mora.data.first_rows import check_columns
from relora_mora.data.read import open_rows
from relora_mora.data.records.encoders import encoder_of, ends_of, packing_of, records_digest
from relora_mora.data.rows import CALL_CHARACTERS, Encode, Encoded, RecordsFound, encoded_in_calls
from relora_mora.data.shard import TEXT, RecordFormat, Shard
from relora_mora.data.sources import token_shards
from relora_mora.data.stream.packing import WholeRows
from relora_mora.data.stream.producer import mixture_names
from relora_mora.data.tokens import index
from relora_mora.system.bars import Bar
from relora_mora.system.files import disk_faults_named, sync, write_synced
from relora_mora.system.logs import log
from relora_mora.system.process import end_with_parent
from relora_mora.tokenizer.identity import tokenizer_fingerprint, vocabulary_size
from relora_mora.tokenizer.load import load_tokenizer

TEXTS_PER_CALL = 1024  # at most, of the tokenizer; the rows of a call are a record batch of the file
_UNFINISHED = ".tmp"  # suffix of a file that is being written
_LOCK = ".lock"


def check_tokens(shards: Sequence[Shard], *, tokenizer_path: str, eos: int | None) -> None:
    """Raises SourceError if shards of tokens do not hold what this tokenizer makes of their text or records."""
    for folder, shard in {Path(shard.location).parent: shard for shard in shards if shard.tokens}.items():
        assert shard.tokens is not None
        made = shard.tokens.making
        tokenizer = load_tokenizer(tokenizer_path)
        now = (tokenizer_fingerprint(tokenizer_path, tokenizer), eos, records_digest(tokenizer, shard.records))
        if (made.tokenizer, made.eos, made.records) != now:
            raise SourceError(
                f"{folder} holds tokens of another tokenizer than {tokenizer_path}, or of records that were written in "
                "another way; give the tokenizer and the data.records (kind, columns, template, score) with which they "
                "were made, or make tokens in another folder"
            )


def make_tokens(
    shards: Sequence[Shard], out: Path, *, config: DataConfig, tokenizer_path: str, processes: int
) -> index.FileStats:
    """Tokenizes the shards whose files are missing in ``out``; returns the totals of the whole folder.

    The shards hold text, or records of one format. Shows a progress bar. Only the limits of ``config`` matter. Raises
    SourceError for text that cannot be read and for a folder that holds something else, TokenizerError for the
    tokenizer, and OSError for the disk or if a process was killed.
    """
    check_columns(shards, config)
    shards, planned = _plan(shards, config, tokenizer_path)
    files = _make(shards, planned, out, config, tokenizer_path, processes)
    counts = {
        name: sum(getattr(file, name) for file in files) for name in index.FileStats.model_fields.keys() - {"digest"}
    }
    return index.FileStats(**counts, digest="")


def tokens_of_whole_rows(shards: Sequence[Shard], config: DataConfig, tokenizer_path: str, cache: Path) -> list[Shard]:
    """The shards, with files of tokens in place of text and records which are packed whole.

    Makes those that are missing in the folder ``cache``, in this process, and removes all other tokens from it. Logs
    how many rows can be used. Raises as :func:`make_tokens`, and SourceError if no row of a source can be used.
    """
    found = list(shards)
    folders: set[Path] = set()
    for name in mixture_names(config):
        own = [number for number, shard in enumerate(shards) if not config.is_mixture or shard.source == name]
        if packing_of(config, [shards[number] for number in own]) == "stream":
            continue
        texts = [number for number in own if shards[number].tokens is None]
        for (source, records), group in groupby(texts, lambda number: (shards[number].source, shards[number].records)):
            numbers = list(group)
            text, planned = _plan([shards[number] for number in numbers], config, tokenizer_path)
            key = f"{planned.model_dump_json()} {[shard.version for shard in text]}"  # also when files were written
            folder = cache / xxhash.xxh3_128_hexdigest(key.encode())
            _make(text, planned, folder, config, tokenizer_path, processes=1)
            folders.add(folder)
            for number, shard in zip(numbers, token_shards(folder), strict=True):
                found[number] = replace(shard, source=source, records=records)
        with closing(WholeRows([found[number] for number in own], config)) as rows:
            log.info("%s%s", name and f"{name}: ", rows)
    for folder in set(cache.glob("*")) - folders:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _plan(shards: Sequence[Shard], config: DataConfig, tokenizer_path: str) -> tuple[list[Shard], index.Index]:
    """The shards at the versions that they have now, and the index of the folder of their tokens."""
    for shard in shards:
        if shard.tokens is not None:
            raise SourceError(f"{Path(shard.location).parent} holds tokens already; give the text of these tokens")
    if len({shard.records for shard in shards}) > 1:
        raise SourceError("the sources hold different kinds of records; tokenize each into a folder of its own")
    shards = with_versions(shards, config.timeout_seconds)
    tokenizer = load_tokenizer(tokenizer_path)
    texts = [
        index.SourceText(
            name=shard.name,
            size=shard.size,
            text_column=shard.text_column,
            origin="hub" if shard.hub else "server" if shard.is_remote else "local",
            content=digest,
        )
        for shard, digest in zip(shards, contents(shards), strict=True)
    ]
    making = index.TokenizationSpec(
        tokenizer=tokenizer_fingerprint(tokenizer_path, tokenizer),
        eos=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
        max_line_bytes=config.max_line_bytes,
        sample_by=config.sample_by if any(shard.format is TEXT for shard in shards) else None,
        records=records_digest(tokenizer, shards[0].records),
        ends=ends_of(tokenizer, shards[0].records),
    )
    return shards, index.Index(making=making, texts=texts)


def _make(
    shards: Sequence[Shard], planned: index.Index, out: Path, config: DataConfig, tokenizer_path: str, processes: int
) -> list[index.FileStats]:
    with _locked_folder(out, planned) as before:
        paths = [index.file_in(out, number) for number in range(len(shards))]
        # those of a finished folder are compared with its index when they are read
        done = {n: before[n] if before else totals_of(path) for n, path in enumerate(paths) if path.exists()}
        left = [number for number in range(len(shards)) if number not in done]
        processes = max(1, min(processes, len(left)))
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        _encoder.cache_clear()  # another tokenizer may be in the same folder by now
        write = partial(write_tokens, config=config, tokenizer_path=tokenizer_path, threads=threads)
        jobs = {number: partial(write, shards[number], paths[number]) for number in left}
        with Bar("tokenizing", "shard", total=len(shards)) as bar:
            # of a shard that this process tokenizes, the bar also shows a part
            results = ((n, job(progress=lambda part: bar.update(len(done) + part))) for n, job in jobs.items())
            for number, totals in results if processes == 1 else _in_processes(jobs, processes, threads):
                done[number] = totals
                bar.update(len(done))
        files = [done[number] for number in range(len(shards))]
        _write_index(out, planned.model_copy(update={"files": files}))
    return files


def _write_index(folder: Path, content: index.Index) -> None:
    write_synced(folder / index.INDEX, content.model_dump_json(indent=1) + "\n")


@contextlib.contextmanager
def _locked_folder(out: Path, planned: index.Index) -> Iterator[list[index.FileStats] | None]:
    """Creates the folder with its index, or opens one, locks it against other commands, and yields its finished files.

    Raises SourceError if the folder belongs to another text, tokenizer or limits, or if another command writes to it.
    """
    lock = out / _LOCK
    if out.exists() and not index.is_token_folder(out) and (not out.is_dir() or {*out.iterdir()} - {lock}):
        raise FileExistsError(f"{out}: exists and holds something else; give a new folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, blocking=False):
            if not index.is_token_folder(out):
                _write_index(out, planned)
            existing = index.read_index(out)
            if (existing.making, existing.texts) != (planned.making, planned.texts):
                raise SourceError(
                    f"{out} holds tokens of another text, or of this text before it changed, or they were made by "
                    "another tokenizer or with other settings of data; give another folder, or remove this one"
                )
            try:
                yield existing.files
            finally:  # processes that were killed, for example after Ctrl-C, leave unfinished files
                for path in out.glob(f"*{_UNFINISHED}"):
                    path.unlink(missing_ok=True)
    except Timeout:
        raise SourceError(f"{out}: another command is making its tokens; wait until it ends") from None


def _in_processes(
    jobs: Mapping[int, Callable[[], index.FileStats]], processes: int, threads: int
) -> Iterator[tuple[int, index.FileStats]]:
    """The results of the jobs, which run in processes. These are killed however it ends."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin_process, initargs=(threads,))
    try:
        numbers = {pool.submit(job): number for number, job in jobs.items()}
        for result in as_completed(numbers):
            yield numbers[result], result.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that makes tokens was killed; if memory ran out, give fewer --processes. "
            "A second call continues from the finished files"
        ) from None
    finally:
        for process in [*(pool._processes or {}).values()]:  # Python 3.14 has a method for this
            process.kill()
        pool.shutdown(cancel_futures=True)


def _begin_process(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        "RAYON_NUM_THREADS": str(threads),
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # no warning that torch is missing
    }
    sys.modules["torch"] = None  # type: ignore[assignment] # tokenizing does not need it: see worker.py
    end_with_parent(os.getppid(), signal.SIGKILL)  # the pool would wait for further jobs


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer_path: str, records: RecordFormat) -> tuple[Encode[Any], Any]:
    """The function that encodes rows, and the columns of a file of them."""
    import pyarrow

    tokenizer = load_tokenizer(tokenizer_path)
    ids = pyarrow.uint16() if vocabulary_size(tokenizer) <= 1 << 16 else pyarrow.uint32()
    columns = {"tokens": pyarrow.list_(ids), "utf8_bytes": pyarrow.int64(), "skipped": pyarrow.string()}
    if not records.is_text:
        columns["scored"] = pyarrow.list_(pyarrow.uint8())
    return encoder_of(tokenizer, records), pyarrow.schema(columns)


def write_tokens(
    shard: Shard,
    path: Path,
    *,
    config: DataConfig,
    tokenizer_path: str,
    threads: int,
    progress: Callable[[float], object] = lambda part: None,
) -> index.FileStats:
    """Tokenizes a shard in bounded memory; the file appears only once it is complete. ``threads``: the tokenizer's.

    ``progress`` is called with the fraction of the shard that has been read. Only the limits of ``config`` matter.
    Raises SourceError for text that cannot be read or has too many bad rows, OSError for a disk that cannot be written.
    """
    import pyarrow

    encode, schema = _encoder(tokenizer_path, shard.records)
    found = RecordsFound(config)
    unfinished = path.with_name(path.name + _UNFINISHED)
    with disk_faults_named(path.parent):
        with closing(open_rows(config, shard)) as opened, unfinished.open("wb") as stream:
            with pyarrow.ipc.new_file(stream, schema) as file:
                rows = chain.from_iterable(iter(lambda: opened.take(TEXTS_PER_CALL), []))
                for made in encoded_in_calls(rows, encode, TEXTS_PER_CALL, threads * CALL_CHARACTERS):
                    for row in made:
                        found.add(row)
                    file.write_batch(_record_batch(made, schema))
                    progress(opened.progress)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
        sync(path.parent)
    return totals_of(path)


def _record_batch(rows: Sequence[Encoded | Skipped], schema: Any) -> Any:
    """The columns of rows."""
    import pyarrow

    values = []
    for row in rows:
        ids, scored, _, size = Encoded([]) if isinstance(row, Skipped) else row
        values.append(
            {
                "tokens": np.array(ids, schema.field("tokens").type.value_type.to_pandas_dtype()),
                "utf8_bytes": size or 0,
                "skipped": row.reason if isinstance(row, Skipped) else None,
                "scored": np.ones(len(ids), np.uint8) if scored is None else np.array(scored, np.uint8),
            }
        )
    return pyarrow.RecordBatch.from_pylist(values, schema=schema)


def totals_of(path: Path) -> index.FileStats:
    """The totals of a file of tokens. Raises SourceError if it is damaged."""
    with closing(MappedTokens(str(path))) as tokens:
        reasons = [reason for _, reason in tokens.skipped()]
        documents = tokens.rows - len(reasons)
        return index.FileStats(
            rows=tokens.rows,
            documents=documents,
            bad=sum(reason in BAD_REASONS for reason in reasons),
            tokens=tokens.ids + documents,
            utf8_bytes=tokens.utf8_bytes,
            digest=samples_digest(str(path)),
        )
