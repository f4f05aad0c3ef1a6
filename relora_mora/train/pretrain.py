"""One call per rank: joins the ranks, checks the settings, builds the run, and trains it to its end."""

import os
from dataclasses import replace
from pathlib import Path

from relora_mora.config.schema import Config
from relora_mora.distributed.collectives import (
    from_first_rank,
    gather_from_ranks,
    is_device_failure,
    is_peer_failure,
    leave_together,
)
from relora_mora.distributed.join import CHECKS, JoinError, joined_within, store_address
from relora_mora.engine.start import init_distributed
from relora_mora.supervise.exits import FAILED, USER_ERROR
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.supervise.watchdog import Watchdog
from relora_mora.system.bars import Bar
from relora_mora.system.files import LOST_DISK
from relora_mora.system.hardware import compute_deterministically, ran_out_of_memory
from relora_mora.system.logs import counted, log, setup_logging
from relora_mora.system.process import give_back_freed_memory
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import build, described, warm_up
from relora_mora.train.begin.inputs import agree, open_inputs, with_whole_text
from relora_mora.train.begin.run_folder import write_run_folder
from relora_mora.train.loop.loop import Trainer
from relora_mora.train.state.resume import begin, checkpoint_at, resume, take_folder


def pretrain(config: Config, guard: Guard | None = None) -> int:
    """Trains a run to its end and returns the exit code: 0, or ``REQUEUE`` when a signal stopped it.

    ``guard`` is the guard of this process if the command created one before its imports.

    Raises the package's ValueErrors for user mistakes, OSError if the run folder cannot be used, and
    :class:`TrainingError` or :class:`MergeError` if training cannot continue. If another rank is lost, the process
    exits here with ``LOST``.
    """
    with guard or Guard(signals=False) as guard:
        try:
            code = _pretrain(config, guard)
        except Exception as error:
            _end_if_lost(guard, error)
            fault = _memory_shortage(config) if ran_out_of_memory(error) else error
            code = USER_ERROR if isinstance(fault, ValueError | OSError) else FAILED
            text = " ".join(str(fault).split()) or type(fault).__name__
            guard.announce_exit(code, text, same_on_all_ranks=getattr(fault, "same_on_all_ranks", False))
            if fault is error:
                raise
            raise fault from error
        leave_together()  # the first rank hosts the store that the other ranks poll
        return code


def _pretrain(config: Config, guard: Guard) -> int:
    with Bar("checking settings, model and data", show=config.log.progress):
        rank, world_size = _join(config, guard)
        inputs = from_first_rank(lambda: open_inputs(config, world_size))  # all checks; nothing is built
        inputs = agree(inputs, config, rank)
        where, mirror = take_folder(inputs, rank, guard)
        inputs = with_whole_text(inputs, guard)
        guard.begin("reading the checkpoint", within=LONG_SECONDS)
        inputs = replace(inputs, checkpoint=checkpoint_at(where, inputs, rank))
    with Bar("reading the checkpoint" if inputs.checkpoint else "building the model", show=config.log.progress):
        guard.begin("building the model", within=LONG_SECONDS)
        run = build(inputs, rank)
        state = resume(run, inputs.checkpoint) if inputs.checkpoint else begin(run)
        warm_up(run, state.step, guard)
    from_first_rank(lambda: write_run_folder(inputs, state))
    log.info("%s", described(run, state.step))
    give_back_freed_memory()
    return _fit(Trainer(run, state, guard, mirror), guard)


def _join(config: Config, guard: Guard) -> tuple[int, int]:
    """Joins the ranks; returns this rank and their number."""
    os.umask(os.umask(0o077) | 0o002)  # no file of a run is world-writable
    if config.train.deterministic:
        compute_deterministically()
    patience = config.train.peer_timeout_seconds
    longest = joined_within(patience)
    late = f"the ranks did not join within {longest:.0f} s; {CHECKS}"
    with guard.bound(longest, late):
        rank, world_size = init_distributed(patience)
        setup_logging(rank)
        if world_size > 1:
            job = from_first_rank(lambda: os.urandom(8).hex())
            stacks = RunFolder(Path(config.train.run_dir)).stacks(rank)
            watch = Watchdog(rank, world_size, patience, address=store_address(), job=job, end=guard.end, stacks=stacks)
            gather_from_ranks(None)  # now every rank has sent its first heartbeat
            guard.watch_peers(watch)
            guard.begin("checking settings, model and data", within=config.data.timeout_seconds + LONG_SECONDS)
    return rank, world_size


def _fit(trainer: Trainer, guard: Guard) -> int:
    try:
        return trainer.fit()
    except Exception as error:
        _end_if_lost(guard, error)  # before close(), which would wait for the lost rank's part of a checkpoint
        if getattr(error, "same_on_all_ranks", False):
            guard.stop_watching()  # close() may take longer on another rank
        raise
    finally:
        trainer.close()


def _end_if_lost(guard: Guard, error: Exception) -> None:
    """Ends the process if another rank, this rank's device or a network file system is gone."""
    first_line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    same = getattr(error, "same_on_all_ranks", False)
    if is_peer_failure(error) and not isinstance(error, JoinError):  # a JoinError has its own message
        guard.peer_failed(first_line)
    if is_device_failure(error):
        guard.machine_failed(f"the device of rank {guard.rank} failed ({first_line})", same_on_all_ranks=same)
    if isinstance(error, OSError) and error.errno in LOST_DISK:
        whose = "" if same else f" rank {guard.rank}"
        place = f"{error.strerror}: {error.filename}"
        guard.machine_failed(f"a disk or network failed{whose} ({place})", same_on_all_ranks=same)


def _memory_shortage(config: Config) -> ValueError:
    sequences = counted(config.train.micro_batch_size, "sequence")
    return ValueError(
        f"train.micro_batch_size: {sequences} of {config.data.sequence_length} tokens, the model and its optimizer "
        "need more memory than the device or its host has; lower it (or eval.micro_batch_size, if it happened in an "
        "evaluation), or see what a run needs with relora-mora plan"
    )
