"""The training loop, and how it ends: on all ranks with the same exit code or error, and with everything saved.

Periodic events are in ``events``.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from relora_mora.checkpoint.mirror import Mirror
from relora_mora.data.stream.packing import Batch, document_boundaries
from relora_mora.data.stream.stream import TrainStream
from relora_mora.distributed.collectives import gather_from_ranks
from relora_mora.optim.groups import group_rates, matrix_rules
from relora_mora.supervise.exits import FINISHED, REQUEUE
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.hardware import to_device
from relora_mora.system.logs import counted, log
from relora_mora.system.seeds import derived_seed
from relora_mora.train.begin.build import Run
from relora_mora.train.loop.evaluating import Evaluating
from relora_mora.train.loop.events import Parts, Reporting, merge, open_parts, save, save_final, save_if_due
from relora_mora.train.loop.step import BatchLoader, DataFailed, LocalBatch, StepResult, Stopping, judge
from relora_mora.train.state.resume import roll_back
from relora_mora.train.state.run_state import RunState, TrainingError


class Trainer:
    """Trains a run from ``state`` to its end."""

    def __init__(self, run: Run, state: RunState, guard: Guard, mirror: Mirror | None = None) -> None:
        config = self.config = run.config
        self.run = run
        self.engine = run.engine
        self.rank = run.engine.rank
        self.state = state
        self.guard = guard
        self.parts = open_parts(run, guard, mirror)
        self.data = TrainStream(
            config.data,
            run.inputs.shards,
            tokenizer_path=config.tokenizer_path,
            batch_size=config.train.batch_size,
            lanes=config.lanes,
            rank=self.rank,
            world_size=run.engine.world_size,
            state=state.data or None,
            step=state.step,
        )
        self.loader = BatchLoader(self.data, config.data, guard)
        is_slow = any(rule.is_slow for rule in matrix_rules(config.optim).values())
        self.update_seconds = LONG_SECONDS if is_slow else None
        self.evaluating = Evaluating(self.parts)
        # in this order after every step: a checkpoint has everything that was done at its step
        self.events: list[Callable[[RunState], None]] = [
            partial(merge, self.parts),
            Reporting(self.parts),
            self.evaluating,
            partial(save_if_due, self.parts),
        ]
        self._continue(rollback=False)

    def fit(self) -> int:
        """Trains to the end, or until some rank is asked to stop; returns the exit code."""
        try:
            with self.parts.bar("reading the validation data"):
                self.evaluating.read()  # can take long if the text is remote, and there is nothing to save yet
            self.guard.training()
            share = self.next_batch()  # text that is unusable fails before an evaluation
            self._before_first_step()
            while share is not None:
                result = self.train_step(share)
                reason = judge(self.parts, self.state, result)
                if reason is not None:
                    self.roll_back(reason)
                else:
                    for event in self.events:
                        event(self.state)
                share = self.next_batch()
        except Stopping:
            return end(self.parts, self.state, REQUEUE)
        except DataFailed as failed:
            with contextlib.suppress(TrainingError):  # data and checkpoints may be on the same lost disk
                save_final(self.parts, self.state)
            raise failed.cause from failed
        return end(self.parts, self.state, FINISHED)

    def _before_first_step(self) -> None:
        state = self.state
        if state.step or self.config.eval.at_start:
            self.evaluating(state)  # a resumed run does what a signal has interrupted
        self._name_best()
        if state.step and state.saved is None:
            save(self.parts, state)  # a run that began with another run's checkpoint gets its own
        state.interval.data_seconds = 0.0  # no step has waited for the start of the workers
        self.parts.steps.restart(state.step)

    def next_batch(self) -> LocalBatch | None:
        """This rank's share of the next global batch, once every rank has its own; None after the last step."""
        if self.state.step >= self.config.train.steps:
            return None
        begin = time.perf_counter()
        with self.parts.bar("waiting for a batch"):
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
        interval.last_loss = step_loss if done.applied else math.nan
        if done.applied and share.scored:
            interval.loss += step_loss
            interval.good_steps += 1
            interval.grad_norm = done.grad_norm
        interval.step_seconds += time.perf_counter() - begin
        self.parts.steps.update(step)
        return StepResult(loss=step_loss, applied=done.applied, grad_norm=done.grad_norm, data=data)

    def roll_back(self, reason: str) -> None:
        """Goes back to the newest good checkpoint from before this step. The data continues where it is."""
        before = self.state
        self.guard.begin(f"step {before.step}: rollback", within=LONG_SECONDS)
        state = roll_back(self.run, before, self.parts.writer, reason)
        if self.config.data.is_mixture:  # batches that were read ahead were drawn for other steps
            self.data.go_back(state.step, state.data)
        self.state = state
        self._continue(rollback=True)
        self._name_best()
        values = {
            "train/rollbacks": state.rollbacks,
            "train/rolled_back_from": before.step,
            "train/skipped_data": before.bad_data,  # the lines that named it belong to dropped steps
        }
        self.parts.metrics.write(state.step, values)

    def _continue(self, *, rollback: bool) -> None:
        """The next step is the one after ``state``, at a start or after a rollback."""
        state = self.state
        state.data = self.data.own_part(state.data)
        self.guard.step = state.step
        continues = state.saved is not None  # the checkpoint that it was loaded from, if any, is in this run's folder
        self.parts.metrics.open(state.step if continues else 0, rollback=rollback)
        self.parts.steps.restart(state.step)
        merge(self.parts, state)  # if a shorter run ended here

    def _name_best(self) -> None:
        """Before the first step, and after a rollback: what the files say may belong to another history."""
        if self.rank == 0:
            self.parts.writer.name_best(None if self.state.best is None else self.state.best.step)

    def close(self) -> None:
        parts = self.parts
        with contextlib.suppress(Exception):
            parts.steps.close()
        self.data.close()
        parts.writer.wait()
        if parts.mirror is not None:
            parts.mirror.close(wait=False)
        parts.metrics.close()


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


def end(parts: Parts, state: RunState, code: int) -> int:
    """The run has made all its steps, or some rank was asked to stop. All ranks leave with this exit code."""
    reason = "done"
    if code == REQUEUE:
        reason = "; ".join(dict.fromkeys(filter(None, gather_from_ranks(parts.guard.stop_reason))))
        log.info(f"stopping after step {state.step} ({reason})")
    save_final(parts, state)
    if code == FINISHED:
        log.info(f"done: {counted(state.step, 'step')}, {state.tokens:,} tokens, {parts.writer.folder}")
    else:
        saved = "saved; the same command continues from here" if state.step else "there is nothing to save yet"
        log.info(f"{saved} (exit code {code})")
    parts.metrics.sync()
    parts.guard.decide(code, reason)
    return code
