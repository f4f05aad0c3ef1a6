"""Makes a folder of tokens: a file for each shard of a text, several at the same time, finished ones only once."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from relora_mora.config.data import DataConfig
from relora_mora.data.content import at_versions, content_digests, remote_versions
from relora_mora.data.errors import SourceError, WorkerError
from relora_mora.data.formats.file_rows import check_is_text, text_encoder
from relora_mora.data.formats.json_lines import is_encodable
from relora_mora.data.formats.kinds import TEXT
from relora_mora.data.sets.show import check_columns
from relora_mora.data.shard import Shard
from relora_mora.data.tokens.index import (
    INDEX,
    FileStats,
    Index,
    SourceText,
    TokenizationSpec,
    file_in,
    is_token_folder,
    read_index,
    total_of,
    write_index,
)
from relora_mora.data.tokens.rows import Header, MappedTokens
from relora_mora.data.tokens.writer import UNFINISHED, totals_of, write_tokens
from relora_mora.system.logs import log, progress_bar

Tell = Callable[[int, float], object]  # the number of a shard, and the part of it that is done
_TELL_SECONDS = 0.5
_COMMIT = re.compile(r"@([0-9a-f]{40})/")  # in the name of a shard on the hub


@dataclass(frozen=True)
class Job:
    """The tokens of one shard, to be made."""

    number: int
    path: Path
    shard: Shard
    head: Header


@dataclass(frozen=True)
class Task:
    """What is the same for all jobs."""

    config: DataConfig
    tokenizer_path: str
    threads: int  # of the tokenizer in each process


def make_tokens(
    shards: Sequence[Shard],
    out: Path,
    *,
    config: DataConfig,
    tokenizer_path: str,
    processes: int,
) -> FileStats:
    """Makes what is missing in ``out`` of the tokens of these shards of text; returns what the folder holds.

    Shows a bar over the bytes of the text, or over its shards where their sizes are not known. Of ``config`` the limits
    count. Raises SourceError for text that cannot be read, and for a folder that holds something else, TokenizerError
    for the tokenizer, OSError for the disk, and where a process was killed.
    """
    if made := next((shard for shard in shards if shard.tokens), None):
        raise SourceError(f"{Path(made.location).parent} holds tokens already; give the text that they are of")
    for shard in shards:
        check_is_text(shard)
        if not is_encodable(shard.name):
            raise SourceError(f"{shard.location!a}: its name is not UTF-8, and tokens are kept by it; rename the file")
    check_columns(shards, config)
    shards = at_versions(shards, remote_versions(shards, config.timeout_seconds))
    index = _planned(shards, config, tokenizer_path)
    with _folder(out, index):
        jobs = [
            Job(number, file_in(out, number), shard, Header(index.making, text, None))
            for number, (shard, text) in enumerate(zip(shards, index.texts, strict=True))
        ]
        done = {job.number: totals for job in jobs if (totals := _finished(job)) is not None}
        left = [job for job in jobs if job.number not in done]
        processes = max(1, min(processes, len(left)))
        task = Task(config, tokenizer_path, max(1, len(os.sched_getaffinity(0)) // processes))
        with _bar(shards, done) as tell:
            done |= _here(task, left, tell) if processes == 1 else _in_processes(task, left, processes, tell)
        files = [done[job.number] for job in jobs]
        write_index(out, index.model_copy(update={"files": files}))
    return total_of(files)


def _planned(shards: Sequence[Shard], config: DataConfig, tokenizer_path: str) -> Index:
    from relora_mora.tokenizer.identity import tokenizer_fingerprint
    from relora_mora.tokenizer.load import load_tokenizer

    eos = int(load_tokenizer(tokenizer_path).eos_token_id)  # type: ignore[arg-type]
    digests = content_digests(shards)
    texts = [
        SourceText(name=s.name, size=s.size, text_column=s.text_column, origin=s.origin, content=digest)
        for s, digest in zip(shards, digests, strict=True)
    ]
    making = TokenizationSpec(
        tokenizer=tokenizer_fingerprint(tokenizer_path),
        eos=eos,
        max_line_bytes=config.max_line_bytes,
        sample_by=config.sample_by if any(shard.format is TEXT for shard in shards) else None,
    )
    return Index(making=making, texts=texts)


@contextlib.contextmanager
def _folder(out: Path, index: Index) -> Iterator[None]:
    """The folder with the index of what it will hold, for this process alone. Raises SourceError for another one."""
    if is_token_folder(out):
        found = read_index(out)
        if found.making != index.making:
            what = "made by another tokenizer, or with another max_line_bytes or sample_by"
        elif found.texts != index.texts:
            what = f"of another text, or of what it was before it changed{_earlier_commit(found, index)}"
        else:
            what = ""
        if what:
            raise SourceError(f"{out} holds tokens {what}; give another folder, or remove this one")
    else:
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(f"{out}: exists and holds something else; give a new folder, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        write_index(out, index)
    with (out / INDEX).open("r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            replaced = not os.path.samestat(os.fstat(lock.fileno()), (out / INDEX).stat())  # by one begun at once
        except BlockingIOError:
            replaced = True
        except OSError as error:
            replaced = False
            log.warning("%s: no lock on its disk (%s); see that no other command writes there", out, error.strerror)
        if replaced:
            raise SourceError(f"{out}: another command makes its tokens now; wait until it ends")
        try:
            yield
        finally:  # a process that is killed, as by Ctrl-C, leaves them
            for path in out.glob(f"*{UNFINISHED}"):
                path.unlink(missing_ok=True)


def _earlier_commit(found: Index, index: Index) -> str:
    """How to go on with the tokens of an earlier commit of the same set."""
    names = [[_COMMIT.sub("@/", text.name) for text in each.texts] for each in (found, index)]
    commit = _COMMIT.search(found.texts[0].name)
    return f" (to go on with it: --data.revision={commit[1]})" if commit and names[0] == names[1] else ""


def _finished(job: Job) -> FileStats | None:
    """What is in a file that an earlier call wrote; None where there is none. Raises SourceError for a damaged one."""
    if not job.path.exists():
        return None
    with contextlib.closing(MappedTokens(str(job.path))) as tokens:
        if tokens.head._replace(groups=None) != job.head:
            raise tokens.damaged("it is another file than its folder says")
    return totals_of(job.path)


@contextlib.contextmanager
def _bar(shards: Sequence[Shard], done: Collection[int]) -> Iterator[Tell]:
    sizes = [shard.size for shard in shards]
    weights = [1 if None in sizes else size or 0 for size in sizes]
    parts: dict[int, float] = {number: weights[number] for number in done}
    with progress_bar("tokens", "shard" if None in sizes else "B") as update:

        def tell(number: int, part: float) -> None:
            parts[number] = part * weights[number]
            update(sum(parts.values()), sum(weights))

        yield tell


def _here(task: Task, jobs: Sequence[Job], tell: Tell) -> dict[int, FileStats]:
    if not jobs:
        return {}
    with _threads(task.threads):
        make = _maker(task)
        return {job.number: make(job, functools.partial(tell, job.number)) for job in jobs}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many of the tokenizer's, while the block lasts; the processes started in it inherit that."""
    wanted = {
        "TOKENIZERS_PARALLELISM": "true" if count > 1 else "false",
        "RAYON_NUM_THREADS": str(count),
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # that it misses torch
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _maker(task: Task) -> Callable[[Job, Callable[[float], object]], FileStats]:
    from relora_mora.tokenizer.identity import vocabulary_size
    from relora_mora.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(task.tokenizer_path)
    encode = text_encoder(tokenizer)
    vocabulary = vocabulary_size(tokenizer)

    def make(job: Job, progress: Callable[[float], object]) -> FileStats:
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

    return make


def _in_processes(task: Task, jobs: Sequence[Job], processes: int, tell: Tell) -> dict[int, FileStats]:
    done: dict[int, FileStats] = {}
    waiting = list(reversed(jobs))
    with _threads(task.threads), _workers(task, processes) as connections:
        busy: dict[Connection, Job] = {}
        for connection in connections:
            busy[connection] = _start(connection, waiting.pop())
        while busy:
            ready = wait(busy)
            for connection, job in list(busy.items()):
                if connection not in ready:
                    continue
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise ChildProcessError(
                        f"the process that made the tokens of {job.shard.name} was killed; "
                        "if memory ran out, give fewer --processes. A second call goes on where this one was"
                    ) from None
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, FileStats):
                    done[job.number] = answer
                    del busy[connection]
                    if waiting:
                        busy[connection] = _start(connection, waiting.pop())
                tell(job.number, 1.0 if isinstance(answer, FileStats) else answer)
    return done


def _start(connection: Connection, job: Job) -> Job:
    with contextlib.suppress(BrokenPipeError):  # it was killed, which is told where its answer is awaited
        connection.send(job)
    return job


@contextlib.contextmanager
def _workers(task: Task, count: int) -> Iterator[list[Connection]]:
    """Processes that make the tokens of each job that they are sent; killed when the block ends.

    They inherit the blocked SIGINT: Ctrl-C is for this process, which ends them.
    """
    context = multiprocessing.get_context("spawn")
    multiprocessing.resource_tracker.ensure_running()  # starting it later would unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    started = []
    try:
        connections = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            connections.append(ours)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield connections
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _work(task: Task, connection: Connection) -> None:
    """Answers each job with numbers, the part that is done, and then its totals; or with an error, the last answer."""
    sys.modules["torch"] = None  # type: ignore[assignment] # tokenizing needs none: see worker.py
    told = time.monotonic()

    def progress(part: float) -> None:
        nonlocal told
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            connection.send(part)

    try:
        make = _maker(task)
        while True:
            connection.send(make(connection.recv(), progress))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody wants more
    except (ValueError, OSError) as error:
        connection.send(error)
    except Exception:
        connection.send(WorkerError(f"a process failed:\n{traceback.format_exc()}"))
