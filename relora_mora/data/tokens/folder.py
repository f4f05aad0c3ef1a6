"""Tokenizes shards into a folder: one file per shard, several at a time. A second call skips finished files."""

import contextlib
import fcntl
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import xxhash

from relora_mora.config.data import DataConfig
from relora_mora.data.content import contents, with_versions
from relora_mora.data.errors import SourceError
from relora_mora.data.first_rows import check_columns
from relora_mora.data.lines import is_encodable
from relora_mora.data.records.encoders import encoder_of, ends_of, packing_of, records_digest
from relora_mora.data.rows import Encode
from relora_mora.data.shard import TEXT, RecordFormat, Shard
from relora_mora.data.sources import token_shards
from relora_mora.data.stream.producer import mixture_names, shards_of_source
from relora_mora.data.stream.whole import WholeRows
from relora_mora.data.tokens import index
from relora_mora.data.tokens.writer import UNFINISHED, totals_of, write_tokens
from relora_mora.system.bars import Bar
from relora_mora.system.logs import log
from relora_mora.system.process import end_with_parent
from relora_mora.tokenizer.identity import tokenizer_fingerprint, vocabulary_size
from relora_mora.tokenizer.load import load_tokenizer

_LOCK = ".lock"


@dataclass(frozen=True)
class Job:
    """One shard to tokenize."""

    shard: Shard
    path: Path
    config: DataConfig
    tokenizer_path: str
    threads: int  # of the tokenizer


def make_tokens(
    shards: Sequence[Shard], out: Path, *, config: DataConfig, tokenizer_path: str, processes: int
) -> index.FileStats:
    """Tokenizes the shards whose files are missing in ``out``; returns the totals of the whole folder.

    The shards hold text, or records of one format. Shows a progress bar in bytes of text, or in shards if a size is
    unknown. Only the limits of ``config`` matter. Raises SourceError for text that cannot be read and for a folder that
    holds something else, TokenizerError for the tokenizer, and OSError for the disk or if a process was killed.
    """
    check_columns(shards, config)
    shards, planned = _plan(shards, config, tokenizer_path)
    return _make(shards, planned, out, config=config, tokenizer_path=tokenizer_path, processes=processes)


def tokens_of_whole_rows(
    shards: Sequence[Shard], config: DataConfig, tokenizer_path: str, cache: Path
) -> dict[int, Shard]:
    """The files of tokens that replace text and records which are packed whole, by the number of their shard.

    Makes those that are missing in the folder ``cache``, in this process, and removes all other tokens from it. Logs
    how many rows can be used. Raises as :func:`make_tokens`, and SourceError if no row of a source can be used.
    """
    replaced: dict[int, Shard] = {}
    folders: list[Path] = []
    for name in mixture_names(config):
        if packing_of(config, shards_of_source(shards, config, name)) == "stream":
            continue
        own = [number for number, shard in enumerate(shards) if shards_of_source([shard], config, name)]
        numbers = [number for number in own if shards[number].tokens is None]
        for _, same_format in groupby(numbers, lambda number: (shards[number].source, shards[number].records)):
            group = list(same_format)
            first = shards[group[0]]
            text, planned = _plan([shards[number] for number in group], config, tokenizer_path)
            key = f"{planned.model_dump_json()} {[shard.version for shard in text]}"  # also when files were written
            folders.append(cache / xxhash.xxh3_128_hexdigest(key.encode()))
            _make(text, planned, folders[-1], config=config, tokenizer_path=tokenizer_path, processes=1)
            for number, shard in zip(group, token_shards(folders[-1]), strict=True):
                replaced[number] = replace(shard, source=first.source, records=first.records)
        with contextlib.closing(WholeRows([replaced.get(number, shards[number]) for number in own], config)) as rows:
            log.info("%s%s", name and f"{name}: ", rows)
    for folder in cache.glob("*"):
        if folder not in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return replaced


def _make(
    shards: Sequence[Shard], planned: index.Index, out: Path, *, config: DataConfig, tokenizer_path: str, processes: int
) -> index.FileStats:
    with _locked_folder(out, planned) as before:
        paths = [index.file_in(out, number) for number in range(len(shards))]
        _encoder.cache_clear()  # another tokenizer may be in the same folder by now
        done = {number: totals_of(path) for number, path in enumerate(paths) if path.exists()}
        for number, totals in done.items():
            if before.files and totals != before.files[number]:
                raise SourceError(f"{paths[number]} has changed since it was made; remove it and make it again")
        left = [number for number in range(len(shards)) if number not in done]
        processes = max(1, min(processes, len(left)))
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        jobs = {number: Job(shards[number], paths[number], config, tokenizer_path, threads) for number in left}
        if left:
            with _progress_bar(shards, done) as report:
                done |= _in_processes(jobs, processes, report) if processes > 1 else _one_by_one(jobs, report)
        files = [done[number] for number in range(len(shards))]
        index.write_index(out, planned.model_copy(update={"files": files}))
    return index.total_of(files)


def _plan(shards: Sequence[Shard], config: DataConfig, tokenizer_path: str) -> tuple[list[Shard], index.Index]:
    """The shards at the versions that they have now, and the index of the folder of their tokens."""
    for shard in shards:
        if shard.tokens is not None:
            raise SourceError(f"{Path(shard.location).parent} holds tokens already; give the text of these tokens")
        if not is_encodable(shard.name):
            raise SourceError(f"{shard.location!a}: its name is not UTF-8, and the index stores it; rename the file")
    if len({shard.records for shard in shards}) > 1:
        raise SourceError("the sources hold different kinds of records; tokenize each into a folder of its own")
    shards = with_versions(shards, config.timeout_seconds)
    tokenizer = load_tokenizer(tokenizer_path)
    texts = [
        index.SourceText(name=s.name, size=s.size, text_column=s.text_column, origin=s.origin, content=digest)
        for s, digest in zip(shards, contents(shards), strict=True)
    ]
    making = index.TokenizationSpec(
        tokenizer=tokenizer_fingerprint(tokenizer_path),
        eos=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
        max_line_bytes=config.max_line_bytes,
        sample_by=config.sample_by if any(shard.format is TEXT for shard in shards) else None,
        records=records_digest(tokenizer, shards[0].records),
        ends=ends_of(tokenizer, shards[0].records),
    )
    return shards, index.Index(making=making, texts=texts)


@contextlib.contextmanager
def _locked_folder(out: Path, planned: index.Index) -> Iterator[index.Index]:
    """Creates the folder with its index, or opens one, locks it against other commands, and yields its index.

    Raises SourceError if the folder belongs to another text, tokenizer or limits, or if another command writes to it.
    """
    lock = out / _LOCK
    if os.path.lexists(out) and not index.is_token_folder(out) and (not out.is_dir() or {*out.iterdir()} - {lock}):
        raise FileExistsError(f"{out}: exists and holds something else; give a new folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceError(f"{out}: another command is making its tokens; wait until it ends") from None
        except OSError as error:
            log.warning(
                "%s: its disk supports no locks (%s); make sure that no other command writes there", out, error.strerror
            )
        existing = index.read_index(out) if index.is_token_folder(out) else planned
        difference = ""
        if existing.making != planned.making:
            difference = "made by another tokenizer, or with another max_line_bytes, sample_by or records"
        elif existing.texts != planned.texts:
            difference = "of another text, or of this text before it changed (data.revision names an earlier commit)"
        if difference:
            raise SourceError(f"{out} holds tokens {difference}; give another folder, or remove this one")
        if existing is planned:
            index.write_index(out, planned)
        try:
            yield existing
        finally:  # processes that were killed, for example after Ctrl-C, leave unfinished files
            for path in out.glob(f"*{UNFINISHED}"):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress_bar(shards: Sequence[Shard], done: Collection[int]) -> Iterator[Callable[[int, float], None]]:
    """Yields a function that is called with the number of a shard and the fraction of it that is done."""
    sizes = [shard.size for shard in shards]
    weights = [1 if None in sizes else size or 0 for size in sizes]
    parts: dict[int, float] = {number: weights[number] for number in done}
    with Bar("tokenizing", "shard" if None in sizes else "byte") as bar:

        def report(number: int, part: float = 1.0) -> None:
            parts[number] = part * weights[number]
            bar.update(sum(parts.values()), sum(weights))

        yield report


def _one_by_one(jobs: Mapping[int, Job], report: Callable[[int, float], None]) -> dict[int, index.FileStats]:
    return {number: _tokenize(job, functools.partial(report, number)) for number, job in jobs.items()}


def _in_processes(
    jobs: Mapping[int, Job], processes: int, report: Callable[[int, float], None]
) -> dict[int, index.FileStats]:
    """Tokenizes the jobs in processes, which are killed however it ends.

    They inherit a blocked SIGINT, because Ctrl-C is meant for this process.
    """
    context = multiprocessing.get_context("spawn")
    multiprocessing.resource_tracker.ensure_running()  # if started later, it would unblock the signal
    others = set(multiprocessing.active_children())
    threads = next(iter(jobs.values())).threads
    pool = ProcessPoolExecutor(processes, context, initializer=_begin_process, initargs=(threads,))
    done = {}
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            numbers = {pool.submit(_tokenize, job): number for number, job in jobs.items()}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for result in as_completed(numbers):
            done[numbers[result]] = result.result()
            report(numbers[result], 1.0)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that makes tokens was killed; if memory ran out, give fewer --processes. "
            "A second call continues from the finished files"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)
    return done


def _begin_process(threads: int) -> None:
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        "RAYON_NUM_THREADS": str(threads),
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # no warning that torch is missing
    }
    sys.modules["torch"] = None  # type: ignore[assignment] # tokenizing does not need it: see worker.py
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with_parent(parent.pid, signal.SIGKILL)  # the pool would wait for further jobs


def _tokenize(job: Job, progress: Callable[[float], object] = lambda part: None) -> index.FileStats:
    encode, vocabulary = _encoder(job.tokenizer_path, job.shard.records)
    return write_tokens(
        job.path,
        job.shard,
        config=job.config,
        encode=encode,
        vocabulary=vocabulary,
        threads=job.threads,
        progress=progress,
    )


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer_path: str, records: RecordFormat | None) -> tuple[Encode[Any], int]:
    tokenizer = load_tokenizer(tokenizer_path)
    return encoder_of(tokenizer, [records], "stream", 0), vocabulary_size(tokenizer)
