"""Tokenizes shards into a folder: one file per shard, several at a time. A second call skips finished files."""

import contextlib
import ctypes
import fcntl
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import xxhash

from relora_mora.config.data import DataConfig
from relora_mora.data.content import at_versions, content_digests, remote_versions
from relora_mora.data.errors import SourceError
from relora_mora.data.lines import is_encodable
from relora_mora.data.records.encoders import encoder_of, ends_of, packing_of, records_digest
from relora_mora.data.sets.show import check_columns
from relora_mora.data.shard import TEXT, Shard
from relora_mora.data.sources.resolve import token_shards
from relora_mora.data.stream.producer import mixture_names, shards_of_source
from relora_mora.data.stream.whole import WholeRows
from relora_mora.data.tokens import index
from relora_mora.data.tokens.rows import Header, MappedTokens
from relora_mora.data.tokens.writer import UNFINISHED, totals_of, write_tokens
from relora_mora.system.bars import Bar
from relora_mora.system.logs import log
from relora_mora.system.process import end_with_parent
from relora_mora.tokenizer.identity import tokenizer_fingerprint, vocabulary_size
from relora_mora.tokenizer.load import load_tokenizer

Progress = Callable[[int, float], object]  # the number of a shard, and the fraction of it that is done
_PROGRESS_SECONDS = 0.5  # between two reports
_work: Callable[["Job", int], index.FileStats]  # of a process that tokenizes


@dataclass(frozen=True)
class Job:
    """One shard to tokenize."""

    number: int
    path: Path
    shard: Shard
    head: Header


@dataclass(frozen=True)
class Task:
    """The settings that all jobs share."""

    config: DataConfig
    tokenizer_path: str
    threads: int  # tokenizer threads in each process


def make_tokens(
    shards: Sequence[Shard], out: Path, *, config: DataConfig, tokenizer_path: str, processes: int
) -> index.FileStats:
    """Tokenizes the shards whose files are missing in ``out``; returns the totals of the whole folder.

    The shards hold text, or records of one format. Shows a progress bar in bytes of text, or in shards if a size is
    unknown. Only the limits of ``config`` matter. Raises SourceError for text that cannot be read and for a folder that
    holds something else, TokenizerError for the tokenizer, and OSError for the disk or if a process was killed.
    """
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
            folders.append(cache / xxhash.xxh3_64_hexdigest(planned.model_dump_json().encode()))
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
    with _locked_folder(out, planned):
        jobs = [
            Job(number, index.file_in(out, number), shard, Header(planned.making, text))
            for number, (shard, text) in enumerate(zip(shards, planned.texts, strict=True))
        ]
        done = {job.number: totals for job in jobs if (totals := _finished(job)) is not None}
        left = [job for job in jobs if job.number not in done]
        if left:
            processes = max(1, min(processes, len(left)))
            task = Task(config, tokenizer_path, max(1, len(os.sched_getaffinity(0)) // processes))
            with _progress_bar(shards, done) as report, _threads(task.threads):
                if processes > 1:
                    done |= _in_processes(task, left, processes, report)
                else:
                    tokenize = _tokenize_function(task, left[0])
                    done |= {job.number: tokenize(job, functools.partial(report, job.number)) for job in left}
        files = [done[job.number] for job in jobs]
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
    check_columns(shards, config)
    shards = at_versions(shards, remote_versions(shards, config.timeout_seconds))
    tokenizer = load_tokenizer(tokenizer_path)
    texts = [
        index.SourceText(name=s.name, size=s.size, text_column=s.text_column, origin=s.origin, content=digest)
        for s, digest in zip(shards, content_digests(shards), strict=True)
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
def _locked_folder(out: Path, planned: index.Index) -> Iterator[None]:
    """Creates the folder with its index, or opens an unfinished one, and locks it against other commands.

    Raises SourceError if the folder belongs to another text, tokenizer or limits, or if another command writes to it.
    """
    if index.is_token_folder(out):
        existing = index.read_index(out)
        difference = ""
        if existing.making != planned.making:
            difference = "made by another tokenizer, or with another max_line_bytes, sample_by or records"
        elif existing.texts != planned.texts:
            difference = "of another text, or of this text before it changed (data.revision names an earlier commit)"
        if difference:
            raise SourceError(f"{out} holds tokens {difference}; give another folder, or remove this one")
    else:
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(f"{out}: exists and holds something else; give a new folder, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        index.write_index(out, planned)
    with (out / index.INDEX).open("r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a command that started at the same time may have replaced the index
            in_use = not os.path.samestat(os.fstat(lock.fileno()), (out / index.INDEX).stat())
        except BlockingIOError:
            in_use = True
        except OSError as error:
            in_use = False
            log.warning(
                "%s: its disk supports no locks (%s); make sure that no other command writes there", out, error.strerror
            )
        if in_use:
            raise SourceError(f"{out}: another command is making its tokens; wait until it ends")
        try:
            yield
        finally:  # processes that were killed, for example after Ctrl-C, leave unfinished files
            for path in out.glob(f"*{UNFINISHED}"):
                path.unlink(missing_ok=True)


def _finished(job: Job) -> index.FileStats | None:
    """The totals of a file that an earlier call finished, or None. Raises SourceError if the file is damaged."""
    if not job.path.exists():
        return None
    with contextlib.closing(MappedTokens(str(job.path))) as tokens:
        if tokens.head != job.head:
            raise tokens.damaged("it is another file than its folder says")
    return totals_of(job.path)


@contextlib.contextmanager
def _progress_bar(shards: Sequence[Shard], done: Collection[int]) -> Iterator[Progress]:
    sizes = [shard.size for shard in shards]
    weights = [1 if None in sizes else size or 0 for size in sizes]
    parts: dict[int, float] = {number: weights[number] for number in done}
    with Bar("tokenizing", "shard" if None in sizes else "byte") as bar:

        def report(number: int, part: float) -> None:
            parts[number] = part * weights[number]
            bar.update(sum(parts.values()), sum(weights))

        yield report


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Limits the tokenizer's threads inside the block, and in the processes that are started in it."""
    wanted = {
        "TOKENIZERS_PARALLELISM": "true" if count > 1 else "false",
        "RAYON_NUM_THREADS": str(count),
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # no warning that torch is missing
    }
    before = {name: os.environ[name] for name in wanted if name in os.environ}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]
        os.environ.update(before)


def _tokenize_function(task: Task, first: Job) -> Callable[[Job, Callable[[float], object]], index.FileStats]:
    tokenizer = load_tokenizer(task.tokenizer_path)
    encode = encoder_of(tokenizer, [first.shard.records], "stream", task.config.sequence_length)
    vocabulary = vocabulary_size(tokenizer)

    def tokenize(job: Job, progress: Callable[[float], object]) -> index.FileStats:
        return write_tokens(
            job.path,
            job.shard,
            job.head,
            config=task.config,
            encode=encode,
            vocabulary=vocabulary,
            threads=task.threads,
            progress=progress,
        )

    return tokenize


def _in_processes(task: Task, jobs: Sequence[Job], processes: int, report: Progress) -> dict[int, index.FileStats]:
    """Tokenizes the jobs in processes, which are killed however it ends.

    They inherit a blocked SIGINT, because Ctrl-C is meant for this process.
    """
    context = multiprocessing.get_context("spawn")
    multiprocessing.resource_tracker.ensure_running()  # if started later, it would unblock the signal
    parts = context.RawArray("d", len(jobs))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, initializer=_begin_process, initargs=(task, jobs[0], parts))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            results = {pool.submit(_tokenize, job, at): job for at, job in enumerate(jobs)}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        running = set(results)
        while running:
            finished, running = wait(running, _PROGRESS_SECONDS, FIRST_EXCEPTION)
            for result in finished:
                result.result()
            for job, part in zip(jobs, parts, strict=True):
                report(job.number, part)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that makes tokens was killed; if memory ran out, give fewer --processes. "
            "A second call continues from the finished files"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)
    return {job.number: result.result() for result, job in results.items()}


def _begin_process(task: Task, first: Job, parts: "ctypes.Array[ctypes.c_double]") -> None:
    """Prepares a process for ``_tokenize``, which sets ``parts[at]`` to the fraction of a job that is done."""
    global _work
    sys.modules["torch"] = None  # type: ignore[assignment] # tokenizing does not need it: see worker.py
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with_parent(parent.pid, signal.SIGKILL)  # the pool would wait for further jobs
    tokenize = _tokenize_function(task, first)

    def work(job: Job, at: int) -> index.FileStats:
        return tokenize(job, functools.partial(parts.__setitem__, at))

    _work = work


def _tokenize(job: Job, at: int) -> index.FileStats:
    return _work(job, at)
