"""The training loop and its ways to end. ``step`` decides what happens when; periodic events are in ``events``."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.checkpoint.writer import CheckpointWriter
from relora_mora.data.lanes import merge_states
from relora_mora.data.stream.packing import Batch, document_boundaries
from relora_mora.data.stream.stream import TrainStream
from relora_mora.distributed.collectives import gather_from_ranks, same_on_all_ranks
from relora_mora.optim.groups import group_rates, matrix_rules
from relora_mora.supervise.exits import FINISHED, REQUEUE
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.hardware import to_device
from relora_mora.system.logs import counted, log
from relora_mora.system.run_folder import RunFolder
from relora_mora.system.seeds import derived_seed
from relora_mora.train.begin.build import Run
from relora_mora.train.log.loggers import make_loggers
from relora_mora.train.log.progress import Progress, next_commands, seconds_since_start
from relora_mora.train.log.report import Metrics
from relora_mora.train.loop.evaluating import Evaluating
from relora_mora.train.loop.events import Merging, Reporting, Saving
from relora_mora.train.loop.step import BatchLoader, DataFailed, LocalBatch, StabilityMonitor, StepResult
from relora_mora.train.state.restore import find_rollback_target, roll_back
from relora_mora.train.state.run_state import DataError, RunState, TrainingError


class Shutdown:
    """Ends a run with the same exit code or error on all ranks. ``sync_metrics`` is called before it is recorded."""

    def __init__(self, folder: Path, saving: Saving, guard: Guard, sync_metrics: Callable[[], None]) -> None:
        self.folder = folder
        self.saving = saving
        self.guard = guard
        self.sync_metrics = sync_metrics

    def finish(self, state: RunState) -> int:
        config = self.saving.run.config
        self.saving.save_final(state)
        log.info(f"done: {counted(state.step, 'step')}, {state.tokens:,} tokens, {RunFolder(self.folder).checkpoints}")
        log.info(next_commands(config.train.run_dir))
        return self._leave(FINISHED, "done")

    def stop(self, state: RunState) -> int:
        """Some rank was asked to stop."""
        reason = "; ".join(dict.fromkeys(filter(None, gather_from_ranks(self.guard.stop_reason))))
        log.info(f"stopping after step {state.step} ({reason})")
        self.saving.save_final(state)
        saved = (
            f"saved; {self.saving.resume_command} continues from here" if state.step else "there is nothing to save yet"
        )
        log.info(f"{saved} (exit code {REQUEUE})")
        return self._leave(REQUEUE, reason)

    def fail_for_data(self, state: RunState, error: DataFailed) -> NoReturn:
        """The data of some rank has failed. All ranks raise the same error."""
        saved = f"\nwhat was trained up to step {state.step} is saved" if state.step else ""
        try:
            self.saving.save_final(state)
        except TrainingError as failed:  # data and checkpoints may be on the same lost disk
            saved = f"\n{failed}"
        lost_disk = next((failure for failure in error.failures if isinstance(failure, OSError)), None)
        if lost_disk is not None:
            raise same_on_all_ranks(lost_disk)
        text = "\n".join(dict.fromkeys(map(str, error.failures)))
        by_user = all(isinstance(failure, ValueError) for failure in error.failures)
        raise (DataError if by_user else TrainingError)(text + saved) from error

    def _leave(self, code: int, reason: str) -> int:
        self.sync_metrics()
        self.guard.decide(code, reason)
        return code


class Trainer:
    """Trains a run from ``state`` to its end. ``resumed_from`` is the checkpoint that the state was loaded from."""

    def __init__(self, run: Run, state: RunState, guard: Guard, resumed_from: CheckpointReader | None = None) -> None:
        config = run.config
        self.run = run
        self.config = config
        self.engine = run.engine
        self.rank = run.engine.rank
        self.state = state
        self.guard = guard
        self.has_stepped = False
        self.folder = Path(config.train.run_dir)
        self.data = TrainStream(
            config.data,
            tokenizer_path=config.tokenizer_path,
            batch_size=config.train.batch_size,
            lanes=config.lanes,
            rank=self.rank,
            world_size=run.engine.world_size,
            state=state.data or None,
            step=state.step,
            shards=run.checked.shards,
        )
        state.data = self.data.own_part(state.data)
        guard.step = state.step
        self.writer = CheckpointWriter(
            RunFolder(self.folder).checkpoints,
            run.engine,
            run.base,
            tokenizer=RunFolder(self.folder).tokenizer,
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            merge_states=merge_states,
            sync_beside=self.sync_metrics,
            report=log.error,
        )
        if resumed_from is not None and state.saved is not None:
            self.writer.adopt_base(resumed_from.manifest)
        first = self.rank == 0
        self.metrics = None
        if first:
            continues = state.saved is not None  # False if the checkpoint is in another run's folder
            self.metrics = Metrics(
                self.folder,
                step=state.step if continues else 0,
                repeated=state.done_at_load.keys() | {"train/rollbacks"},
                loggers=make_loggers(self.folder, config.log),
            )
        self.progress = Progress(total=config.train.steps, done=state.step, show=first and config.log.progress)
        self.loader = BatchLoader(self.data, config.data, guard)
        is_slow = any(rule.is_slow for rule in matrix_rules(config.optim).values())
        self.update_seconds = LONG_SECONDS if is_slow else None
        self.monitor = StabilityMonitor(config, self.rank, run.engine.world_size, self.write, self._can_roll_back)
        self.merging = Merging(run, guard, self.write, before=self.writer.wait_for_base)
        self.reporting = Reporting(run, self.write, self.progress)
        self.evaluating = Evaluating(run, guard, self.write, self.progress)
        self.saving = Saving(run, self.writer, guard, self.write)
        self.shutdown = Shutdown(self.folder, self.saving, guard, self.sync_metrics)
        self._write_done_at_load()

    def fit(self) -> int:
        """Trains to the end, or until some rank is asked to stop; returns the exit code."""
        try:
            with self.progress.bar("reading the validation data"):
                self.evaluating.read()  # can take long if the text is remote, and there is nothing to save yet
            self.guard.training()
            return self._fit()
        except DataFailed as error:
            self.shutdown.fail_for_data(self.state, error)

    def _fit(self) -> int:
        first = None
        if self.evaluating.is_due_at_start(self.state):
            if self.state.step < self.config.train.steps:
                first = self.next_batch()  # fails for unusable text before an evaluation, which can take long
                if first is None:
                    return self.shutdown.stop(self.state)
            if not self.evaluating.evaluate(self.state):
                return self.shutdown.stop(self.state)
        self.saving.name_best(self.state)
        if self.state.step and self.state.saved is None and self.state.trouble is None:
            self.saving.save(self.state)  # a run that began with another run's checkpoint gets its own
        self.progress.begin(self.state.step)
        while self.state.step < self.config.train.steps or self.state.trouble:
            share = first or self.next_batch()
            first = None
            if share is None:
                return self.shutdown.stop(self.state)
            if self.state.trouble:
                self.roll_back()
                if self.config.data.is_mixture:  # the batch was drawn for another step
                    self.data.go_back(self.state.step, self.state.data)
                    continue
            result = self.train_step(share)
            self.monitor(self.state, result)
            if self.state.trouble:
                continue
            self.merging.after_step(self.state)
            self.reporting.after_step(self.state, result.loss)
            if not self.evaluating.after_step(self.state):
                return self.shutdown.stop(self.state)
            self.saving.after_step(self.state)
        if not self.evaluating.after_step(self.state):
            return self.shutdown.stop(self.state)
        return self.shutdown.finish(self.state)

    def next_batch(self) -> LocalBatch | None:
        """This rank's share of the next global batch, once every rank has its own; None if the ranks stop."""
        begin = time.perf_counter()
        with self.progress.bar("waiting for a batch"):
            share = self.loader.next_batch(self.state.step + 1)
        self.state.interval.data_seconds += time.perf_counter() - begin
        return share

    def train_step(self, share: LocalBatch) -> StepResult:
        """One optimizer step on this rank's share of a global batch.

        The loss is the sum over the scored tokens of all ranks and micro-batches, divided by their number. DeepSpeed
        averages over micro-batches and ranks, so each micro-batch divides its sum by an equal share of that number.
        """
        begin = time.perf_counter()
        state = self.state
        step = state.step + 1
        pieces = list(micro_batches(share.batch, self.config.train.micro_batch_size, self.engine.device))
        tokens = max(1, share.scored) / (len(pieces) * self.engine.world_size)
        losses = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        self.engine.train()
        for index, (input_ids, labels, boundaries) in enumerate(pieces):
            self.guard.begin(f"step {step}: micro-batch {index + 1} of {len(pieces)}")
            torch.manual_seed(derived_seed(self.config.train.seed, "dropout", state.step, self.rank, index))
            loss = self.engine(input_ids, labels, boundaries, tokens)
            losses += loss.detach()
            # a loss that is not finite may have a finite gradient; NaN keeps every rank from stepping
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
            self.engine.accumulate(loss, last=index == len(pieces) - 1)
        self.guard.begin(f"step {step}: optimizer", within=self.update_seconds)
        rates = group_rates(self.run.schedule, self.run.groups, step)
        done = self.engine.step(rates, losses / len(pieces))
        batch = share.batch
        data = [] if done.applied else self.data.describe(state.data, batch.state)
        state.step = self.guard.step = step
        state.tokens += self.config.tokens_per_step
        state.data = batch.state
        interval = state.interval
        interval.data_counts = batch.counts
        interval.steps += 1
        step_loss = done.loss if share.scored else math.nan  # no loss without scored tokens
        if done.applied and share.scored:
            interval.loss += step_loss
            interval.good_steps += 1
            interval.grad_norm = done.grad_norm
        interval.step_seconds += time.perf_counter() - begin
        self.progress.update()
        if not self.has_stepped:
            self.has_stepped = True
            seconds = seconds_since_start()
            log.info(f"start: {seconds:.1f} s from the start of Python to the end of the first step")
            self.write(step, {"startup/seconds": seconds})
        return StepResult(loss=step_loss, applied=done.applied, grad_norm=done.grad_norm, data=data)

    def _can_roll_back(self, step: int) -> bool:
        self.guard.begin(f"step {step}: looking for a checkpoint to go back to", within=LONG_SECONDS)
        return find_rollback_target(self.run, step, self.writer) is not None

    def roll_back(self) -> None:
        """Goes back to a checkpoint from before the trouble. The data continues where it is."""
        before = self.state
        self.guard.begin(f"step {before.step}: rollback", within=LONG_SECONDS)
        state = roll_back(self.run, before, self.writer)
        state.data = self.data.own_part(state.data)
        self.state = state
        self.saving.name_best(state)
        self.guard.step = state.step
        self.progress.begin(state.step)
        if self.metrics is not None:
            self.metrics.go_back(state.step, repeated=state.done_at_load.keys())
        values = {"train/rollbacks": state.rollbacks, "train/rolled_back_from": before.step}
        # the lines that named the bad data belong to dropped steps
        skipped = {"train/skipped_data": before.health.bad_data} if before.health.bad_data else {}
        self.write(state.step, {**values, **skipped})
        self._write_done_at_load()

    def _write_done_at_load(self) -> None:
        if self.state.done_at_load:
            self.write(self.state.step, self.state.done_at_load)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes metrics of a step, on the first rank only."""
        if self.metrics is not None:
            self.metrics.write(step, values)

    def sync_metrics(self) -> None:
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.progress.close()
        self.data.close()
        self.writer.wait()
        if self.metrics is not None:
            self.metrics.close()


def micro_batches(batch: Batch, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """input_ids and labels [micro, T] on the device, and document boundaries if attention is masked.

    The whole share is copied at once.
    """
    input_ids = to_device(batch.input_ids, device)
    labels = to_device(batch.labels, device)
    documents = batch.document_ids
    for start in range(0, len(input_ids), size):
        piece = slice(start, start + size)
        boundaries = None if documents is None else to_device(document_boundaries(documents[piece]), device)
        yield input_ids[piece], labels[piece], boundaries
