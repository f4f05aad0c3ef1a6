"""One call per rank: joins the ranks, checks the settings, builds the run, and trains it to its end."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.config.checks.combinations import remarks
from relora_mora.config.data import DataConfig
from relora_mora.config.lengths import with_counted_epochs
from relora_mora.config.schema import Config
from relora_mora.data.content import at_versions, remote_content, remote_versions
from relora_mora.data.sets.reading import count_epochs
from relora_mora.data.sets.show import check_columns, check_lanes, check_records
from relora_mora.data.shard import Shard, Version
from relora_mora.data.sources.named_sets import Datasets, find_datasets, remember_datasets
from relora_mora.data.sources.names import with_commits
from relora_mora.data.tokens.folder import tokens_of_whole_rows
from relora_mora.distributed import collectives
from relora_mora.distributed.join import CHECKS, JoinError, joined_within, store_address
from relora_mora.engine.start import init_distributed
from relora_mora.evaluation.harness import check_tasks
from relora_mora.optim.own import with_rule
from relora_mora.supervise.exits import FAILED, USER_ERROR
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.supervise.lock import RunLock
from relora_mora.supervise.watchdog import Watchdog
from relora_mora.system.bars import Bar
from relora_mora.system.files import LOST_DISK
from relora_mora.system.hardware import compute_deterministically, ran_out_of_memory
from relora_mora.system.logs import counted, log, setup_logging, shared_log
from relora_mora.system.process import give_back_freed_memory
from relora_mora.system.run_folder import RunFolder
from relora_mora.tokenizer.files import TokenizerError, check_exists
from relora_mora.train.begin.build import build, warm_up
from relora_mora.train.begin.check import (
    ResolvedRun,
    check,
    check_agreement,
    check_model,
    check_shared,
    task_settings,
    with_chosen_products,
    with_saved_commits,
)
from relora_mora.train.begin.identity import Identity, changes_since
from relora_mora.train.begin.run_folder import check_run_folder, keep_run_folder, write_run_folder
from relora_mora.train.log.loggers import check_loggers
from relora_mora.train.log.progress import describe
from relora_mora.train.loop.loop import Trainer
from relora_mora.train.state.restore import start_records
from relora_mora.train.state.resume import (
    open_checkpoint,
    resume,
    where_to_resume,
)
from relora_mora.train.state.run_state import MemoryShortage, RunState
from relora_mora.weights.vocabulary import with_vocabulary

COUNTING_SECONDS = 86400.0  # nobody trains several epochs on a text that takes longer than this to read once


def pretrain(config: Config, guard: Guard | None = None) -> int:
    """Trains a run to its end and returns the exit code: 0, or ``REQUEUE`` when a signal stopped it.

    ``guard`` is the guard of this process if the command created one before its imports.

    Raises the package's ValueErrors for user mistakes, OSError if the run folder cannot be used, and
    :class:`TrainingError` or :class:`MergeError` if training cannot continue. If another rank is lost, the process
    exits here with ``LOST``.
    """
    with guard or Guard(signals=False) as guard:
        try:
            code = _run(config, guard)
        except Exception as error:
            _end_if_lost(guard, error)
            mistake = isinstance(error, ValueError | OSError)
            text = " ".join(str(error).split()) or type(error).__name__
            guard.announce_exit(
                USER_ERROR if mistake else FAILED, text, same_on_all_ranks=getattr(error, "same_on_all_ranks", False)
            )
            raise
        collectives.leave_together()  # the first rank hosts the store that the other ranks poll
        return code


def _run(config: Config, guard: Guard) -> int:
    try:
        return _pretrain(config, guard)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        sequences = counted(config.train.micro_batch_size, "sequence")
        raise MemoryShortage(
            f"train.micro_batch_size: {sequences} of {config.data.sequence_length} "
            "tokens, the model and its optimizer need more memory than the device or its host has; lower it (or "
            "eval.micro_batch_size, if it happened in an evaluation), or see what a run needs with relora-mora plan"
        ) from error


def _pretrain(config: Config, guard: Guard) -> int:
    with Bar("checking settings, model and data", show=config.log.progress):
        checked, begin, rank, world_size = _check(config, guard)
    return _train(checked, begin, rank, world_size, guard)


def _check(config: Config, guard: Guard) -> tuple[ResolvedRun, Path | None, int, int]:
    """Joins the ranks and checks everything; returns the run, where it begins, this rank, and the number of ranks."""
    os.umask(os.umask(0o077) | 0o002)  # no file of a run is world-writable
    if config.train.deterministic:
        compute_deterministically()
    longest = joined_within(config.train.peer_timeout_seconds)
    late = f"the ranks did not join within {longest:.0f} s; {CHECKS}"
    with guard.bound(longest, late):
        rank, world_size = init_distributed(config.train.peer_timeout_seconds)
        setup_logging(rank)
        if world_size > 1:
            _watch(guard, config, rank, world_size)
    folder = Path(config.train.run_dir)
    collectives.from_first_rank(lambda: _check_here(config, folder))
    data, datasets = collectives.from_first_rank(lambda: _pin_commits(config))
    remember_datasets(datasets)
    config = collectives.on_all_ranks(lambda: with_vocabulary(with_rule(config.model_copy(update={"data": data}))))
    config = with_chosen_products(config)
    checked = collectives.on_all_ranks(lambda: check(config, world_size))
    check_agreement(checked.identity)
    shards = at_versions(checked.shards, collectives.from_first_rank(lambda: _check_remote_data(checked, data)))
    checked = replace(checked, shards=shards, data_content=checked.data_content + remote_content(shards))
    collectives.from_first_rank(lambda: check_lanes(shards, data, config.lanes))
    if checked.chat_template is not None:  # the saved tokenizer, also of an export, writes what the run trains on
        checked.tokenizer.chat_template = checked.chat_template
    lock = collectives.from_first_rank(lambda: _lock(guard, folder))
    check_shared(RunFolder(folder).lock, lock)
    guard.record_in(folder)
    begin = collectives.from_first_rank(lambda: where_to_resume(config))
    # slow, so they come after every other check
    guard.begin("tokenizing rows that are packed whole", within=COUNTING_SECONDS)
    shards = _with_tokens(checked, RunFolder(folder).tokens)
    checked = replace(checked, shards=shards)
    if config.train.epochs is not None:
        guard.begin("counting the tokens of the training text", within=COUNTING_SECONDS)
        tokens = collectives.from_first_rank(lambda: _count(config, shards))
        epochs, warmup_fraction = config.train.epochs, config.optim.warmup_fraction
        config = with_counted_epochs(config, tokens)
        checked = replace(checked, config=config, epochs=epochs, warmup_fraction=warmup_fraction)
    for remark in remarks(config):
        shared_log.warning(remark)
    return checked, begin, rank, world_size


def _train(checked: ResolvedRun, begin: Path | None, rank: int, world_size: int, guard: Guard) -> int:
    """Builds the run, trains it from ``begin`` to its end, and returns the exit code; a collective."""
    config = checked.config
    with Bar("building the model" if begin is None else "reading the checkpoint", show=config.log.progress):
        guard.begin("reading the checkpoint", within=LONG_SECONDS)
        reader = None if begin is None else open_checkpoint(checked, begin, rank, world_size)
        guard.begin("building the model", within=LONG_SECONDS)
        run = build(checked, rank, world_size, resumes=reader is not None)
        if reader is not None:
            guard.begin("reading the checkpoint", within=LONG_SECONDS)
            state = resume(run, reader)
        else:
            state = RunState(initial_seed=config.train.seed)
        if checked.compiled:
            warm_up(run, state, guard)
    _record_start(checked, world_size, state, reader)
    log.info("%s", describe(run, state))
    give_back_freed_memory()
    trainer = Trainer(run, state, guard, resumed_from=reader)
    try:
        return trainer.fit()
    except Exception as error:
        _end_if_lost(guard, error)  # before close(), which would wait for the lost rank's part of a checkpoint
        if getattr(error, "same_on_all_ranks", False):
            guard.stop_watching()  # close() may take longer on another rank
        raise
    finally:
        trainer.close()


def _record_start(checked: ResolvedRun, world_size: int, state: RunState, reader: CheckpointReader | None) -> None:
    """Writes what describes this start into the run folder; a collective."""
    config = checked.config
    if reader is None:
        collectives.from_first_rank(lambda: start_records(RunFolder(Path(config.train.run_dir))))
    else:
        log.info("resumed from %s at step %d", reader.folder, state.step)
    if reader is not None and state.step == config.train.steps and state.evaluated == state.step:
        made_with = reader.manifest.config
        collectives.from_first_rank(lambda: keep_run_folder(config, made_with))
        return
    before = None if reader is None else Identity.of(reader.manifest)
    changed = None if before is None else [change.text for change in changes_since(before, checked.identity, set())]
    collectives.from_first_rank(lambda: write_run_folder(checked, world_size, state.step, changed=changed))


def _end_if_lost(guard: Guard, error: Exception) -> None:
    """Ends the process if another rank, this rank's device or a network file system is gone."""
    first_line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    same = getattr(error, "same_on_all_ranks", False)
    if collectives.is_peer_failure(error) and not isinstance(error, JoinError):  # a JoinError has its own message
        guard.peer_failed(first_line)
    if collectives.is_device_failure(error):
        guard.machine_failed(f"the device of rank {guard.rank} failed ({first_line})", same_on_all_ranks=same)
    if isinstance(error, OSError) and error.errno in LOST_DISK:
        whose = "" if same else f" rank {guard.rank}"
        guard.machine_failed(
            f"a disk or network failed{whose} ({error.strerror}: {error.filename})", same_on_all_ranks=same
        )


def _check_here(config: Config, folder: Path) -> None:
    """Finds what is wrong on this machine before a server is asked for anything, which may take minutes."""
    check_loggers(config.log)
    if config.eval.tasks:
        check_tasks(task_settings(config.eval))
    check_run_folder(folder)
    check_model(config)
    if config.tokenizer.path is not None:
        try:
            check_exists(Path(config.tokenizer.path))
        except TokenizerError as error:
            raise TokenizerError(f"tokenizer.path: {error}") from error


def _pin_commits(config: Config) -> tuple[DataConfig, Datasets]:
    """The data settings with each revision pinned to one commit for the whole run, and the files of its hub datasets.

    Only one rank asks the hub.
    """
    data = with_commits(with_saved_commits(config))
    return data, find_datasets(data)


def _with_tokens(checked: ResolvedRun, cache: Path) -> list[Shard]:
    """The shards, with files of tokens in place of text and records that are packed whole; a collective."""
    config = checked.config
    made: dict[int, Shard] = collectives.from_first_rank(
        lambda: tokens_of_whole_rows(checked.shards, config.data, config.tokenizer_path, cache)
    )
    return [made.get(number, shard) for number, shard in enumerate(checked.shards)]


def _count(config: Config, shards: Sequence[Shard]) -> int:
    """Counts the tokens of ``train.epochs``. One rank reads the whole text."""
    begin = time.perf_counter()
    epochs = config.train.epochs or 1.0
    log.info("train.epochs: counting the tokens of the training text")
    with Bar("counting the tokens of the training text", show=config.log.progress):
        tokens = count_epochs(config.data, config.tokenizer_path, lanes=config.lanes, epochs=epochs, shards=shards)
    log.info("%s epochs have %s tokens (%.1f s)", f"{epochs:g}", f"{tokens:,}", time.perf_counter() - begin)
    return tokens


def _check_remote_data(checked: ResolvedRun, data: DataConfig) -> dict[int, Version]:
    """Checks columns and records of remote shards, and asks servers for the shards' versions. Only one rank asks."""
    remote = [shard for shard in checked.shards if shard.is_remote]
    check_columns(remote, data)
    check_records(remote, data, checked.tokenizer)
    return remote_versions(checked.shards, data.timeout_seconds)


def _watch(guard: Guard, config: Config, rank: int, world_size: int) -> None:
    watch = Watchdog(
        rank,
        world_size,
        config.train.peer_timeout_seconds,
        address=store_address(),
        job=collectives.from_first_rank(lambda: os.urandom(8).hex()),
        end=guard.end,
        stacks=RunFolder(Path(config.train.run_dir)).stacks(rank),
    )
    collectives.gather_from_ranks(None)  # now every rank has sent its first heartbeat
    guard.watch_peers(watch)
    guard.begin("checking settings, model and data", within=config.data.timeout_seconds + LONG_SECONDS)


def _lock(guard: Guard, folder: Path) -> str:
    """Takes the lock of the run folder and returns the content of the lock file."""
    lock = RunLock(folder, guard.folder_lost)
    before = lock.acquire()
    guard.hold(lock)
    if before is not None:
        log.warning(
            "the previous trainer (%s) ended without giving a reason: it was killed, or its machine failed", before
        )
    return lock.path.read_text(encoding="utf-8")
