"""The training loop. Everything periodic is a named method beside it; what happens when follows from ``step`` alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relora_mora.checkpoint import CheckpointWriter
from relora_mora.data import Batch, EvalSet, TrainStream, merge_states
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, sum_over_hosts
from relora_mora.evaluate import evaluate, held_out
from relora_mora.optim import group_rates
from relora_mora.plan.flops import flops_per_token
from relora_mora.supervise import LONG_SECONDS, Guard
from relora_mora.system.hardware import peak_memory_bytes
from relora_mora.system.logs import log, shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.system.seeds import derived_seed
from relora_mora.train.build import Run
from relora_mora.train.check import Checked
from relora_mora.train.ends import end_for_data, finish, stop
from relora_mora.train.health import Health
from relora_mora.train.metrics import Metrics
from relora_mora.train.progress import Progress
from relora_mora.train.report import Interval, data_metrics, loss_metrics, merge_metrics, peak_of_device
from relora_mora.train.rollback import roll_back
from relora_mora.train.state import manifest_of

WORKER_SECONDS = 60.0  # that a data worker may do nothing, beyond data.timeout_seconds
POLL_SECONDS = 1.0  # a rank that waits for data looks so often whether the others want to stop


class Meeting(NamedTuple):
    """What the ranks tell each other before a step."""

    stop: bool
    all_ready: bool
    failed: bool


class Trainer:
    def __init__(self, checked: Checked, run: Run, rank: int, world_size: int, guard: Guard) -> None:
        config = checked.config
        self.config, self.checked, self.run, self.rank, self.world_size, self.guard = (
            config,
            checked,
            run,
            rank,
            world_size,
            guard,
        )
        self.engine, self.schedule, self.device = run.engine, run.schedule, run.engine.device
        self.folder = Path(config.train.run_dir)
        self.metrics = Metrics(self.folder, step=run.step, tensorboard=config.log.tensorboard) if rank == 0 else None
        self.progress = Progress(total=config.train.steps, done=run.step, show=rank == 0 and config.log.progress)
        self.flops = flops_per_token(checked.model_config, config).total
        self.peak = peak_of_device(config, bf16=checked.bf16)
        self.eval_set: EvalSet | None = None
        self.data = TrainStream(
            config.data,
            tokenizer_path=config.tokenizer.path,
            batch_size=config.train.batch_size,
            lanes=config.lanes,
            rank=rank,
            world_size=world_size,
            state=run.data_state,
            shards=checked.shards,
        )
        self.data_counts: dict[str, int] = {}
        self.writer = CheckpointWriter(
            RunFolder(self.folder).checkpoints,
            run.engine,
            run.base,
            tokenizer=RunFolder(self.folder).tokenizer,
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            merge_states=merge_states,
            report=log.error,
        )
        self.begin_at(run)

    def begin_at(self, run: Run) -> None:
        """Takes the clock and all counts from where the run stands: at the start, and after a rollback."""
        self.step = self.guard.step = run.step
        counters = run.counters
        self.tokens, self.skipped = counters.get("tokens", 0), counters.get("skipped_steps", 0)
        self.rollbacks = counters.get("rollbacks", 0)
        self.data_state: dict[str, Any] = self.data.own_part(run.data_state or {})
        self.health = Health(**{key: counters[key] for key in ("losses", "bad_steps", "bad_data") if key in counters})
        self.interval = Interval(self.device, counters.get("interval"))
        self.pending_loss: float | None = None
        self.trouble: str | None = counters.get("trouble")
        reader = run.resumed_from
        own = reader is not None and reader.folder.parent.resolve() == RunFolder(self.folder).checkpoints.resolve()
        # a step is evaluated before it is saved: what was resumed has both, unless a signal cut the evaluation short
        self.saved = run.step if own else None
        self.evaluated = run.step if own and counters.get("evaluated", True) else None
        if own and reader is not None:
            self.writer.adopt_base(reader.folder, reader.manifest)

    # ---- the loop ---------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Trains to the end, or until some rank is asked to stop; returns the exit code."""
        self.guard.training()
        if self.evaluation_is_missing() and not self.evaluate():
            return stop(self)
        while self.step < self.config.train.steps:
            batch = self.next_batch()
            if batch is None:
                return stop(self)
            self.train_step(batch)
            if self.trouble:
                roll_back(self, self.trouble)
                continue
            if self.schedule.merge_after(self.step):
                self.merge()
            # before what a signal may cut short, and before the checkpoint that a resume begins at: else this line would be lost
            if self.is_due(self.config.log.every_steps) or self.step == self.config.train.steps:
                self.log()
            if (
                self.is_due(self.config.eval.every_steps) or self.step == self.config.train.steps
            ) and not self.evaluate():
                return stop(self)
            if self.is_due(self.config.checkpoint.every_steps):
                self.save()
        return finish(self)

    def is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0

    def evaluation_is_missing(self) -> bool:
        """The first one, and one that a signal cut short."""
        if self.step == 0:
            return self.config.eval.at_start
        return self.saved == self.step != self.evaluated

    def next_batch(self) -> Batch | None:
        """The next batch when every rank has its own; None when the ranks stop."""
        begin = time.perf_counter()
        batch, failure = None, None
        patience = self.config.data.timeout_seconds + WORKER_SECONDS
        within = patience if self.config.data.workers else self.config.data.timeout_seconds + LONG_SECONDS
        while True:
            self.guard.begin(f"step {self.step + 1}: waiting for data", within=within)
            if batch is None and failure is None and self.data.ready(POLL_SECONDS):
                try:
                    batch = next(self.data)
                except (
                    ValueError,
                    RuntimeError,
                    OSError,
                ) as error:  # a source that cannot be read, a data worker that was killed
                    failure = error
            if batch is None and failure is None:
                failure = self.data.hung(patience)
            meeting = self.meet(ready=batch is not None, failed=failure is not None)
            if meeting.failed:
                end_for_data(self, failure)
            if meeting.stop:
                return None
            if meeting.all_ready and batch is not None:
                break
        self.interval.data_seconds += time.perf_counter() - begin
        self.data_counts = batch.counts
        for note in batch.notes:
            log.warning("data: %s", note)
        if self.trouble:  # what the last step did to the loss is known only now, and may have stood in the checkpoint
            roll_back(self, self.trouble)
        return batch

    def meet(self, *, ready: bool = True, failed: bool = False) -> Meeting:
        """Once a step the ranks agree, through host memory: whether to stop, whether all have data, and the last step's loss."""
        pending, self.pending_loss = self.pending_loss, None
        stop = self.guard.stop_reason is not None
        stops, waiting, failures, loss = sum_over_hosts([float(stop), float(not ready), float(failed), pending or 0.0])
        if pending is not None:
            self.judge_loss(loss / self.world_size)
        return Meeting(stops > 0, waiting == 0, failures > 0)

    def train_step(self, batch: Batch) -> None:
        """One optimizer step on this rank's share of a global batch."""
        begin = time.perf_counter()
        pieces = list(micro_batches(batch, self.config.train.micro_batch_size, self.device))
        losses = torch.zeros_like(self.interval.loss)
        self.engine.train()
        for index, (input_ids, labels, document_ids) in enumerate(pieces):
            self.guard.begin(f"step {self.step + 1}: micro-batch {index + 1} of {len(pieces)}")
            torch.manual_seed(derived_seed(self.config.train.seed, "dropout", self.step, self.rank, index))
            loss = self.engine(input_ids, labels, document_ids)
            losses += loss.detach()
            # a loss that is not finite may have a gradient that is: then that shall not be, so that no rank steps
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
            self.engine.accumulate(loss, last=index == len(pieces) - 1)
        self.guard.begin(f"step {self.step + 1}: optimizer")
        norm, applied = self.engine.step(group_rates(self.schedule, self.run.groups, self.step + 1))
        self.step += 1
        self.guard.step = self.step
        self.tokens += self.config.tokens_per_step
        before, self.data_state = self.data_state, batch.state
        self.interval.steps += 1
        if applied:
            self.health.good()
            self.interval.loss += losses / len(pieces)
            self.interval.good_steps += 1
            self.interval.grad_norm = norm
            self.pending_loss = float(losses) / len(pieces)
        else:
            self.count_bad(norm, self.data.describe(batch.state, since=before), finite=bool(torch.isfinite(losses)))
        self.interval.seconds += time.perf_counter() - begin
        self.progress.update()

    # ---- numbers gone wrong -----------------------------------------------------------------------------------

    def count_bad(self, norm: float, places: list[str], *, finite: bool) -> None:
        """Reports a step that no rank made, and the data of the ranks whose loss was not finite; too many in a row are trouble."""
        self.skipped += 1
        named = gather_from_ranks(None if finite else f"rank {self.rank}: {'; '.join(places)}")
        where = [place for place in named if place] or [f"global batch {self.step}"]
        row = self.health.bad(where)
        shared_log.warning(
            "step %d skipped on all ranks: gradient not finite (norm %s); its data: %s",
            self.step,
            norm,
            " | ".join(where),
        )
        self.write({"train/skipped_steps": self.skipped, "train/skipped_data": where})
        if row >= self.config.train.max_bad_steps:
            self.trouble = f"the gradient was not finite for {row} steps in a row (train.max_bad_steps), the last is step {self.step}"

    def judge_loss(self, loss: float) -> None:
        """Flags a spike of the last step's loss, the mean over all ranks."""
        height = self.health.spike(loss, self.config.train)
        if height is None:
            return
        shared_log.warning(
            "step %d: loss spike, %.4f is %.1f standard deviations above the mean before", self.step, loss, height
        )
        self.write({"train/loss_spike": height, "train/spike_loss": loss})
        if self.config.train.on_spike == "rollback":
            self.trouble = (
                f"the loss of step {self.step} ({loss:.4f}) is {height:.1f} standard deviations above the mean"
            )

    # ---- events -----------------------------------------------------------------------------------------------

    def merge(self) -> None:
        self.guard.begin(f"step {self.step}: merge", within=LONG_SECONDS)
        self.writer.wait_for_base()
        done, operator = self.schedule.merges_done(self.step), self.schedule.operator(self.step)
        record = self.run.merger.merge(self.step, done, operator)
        self.write(merge_metrics(record))
        switched = (
            f", operator {record.operator_before} -> {record.operator_after}"
            if record.operator_after is not None
            else ""
        )
        log.info(f"step {self.step}: merged {record.layers} layers in {record.seconds:.2f} s{switched}")

    def evaluate(self) -> bool:
        """Held-out loss; every token of the evaluation set once. False when the ranks stop before its end."""
        begin = time.perf_counter()
        if self.eval_set is None:
            self.guard.begin("reading the validation data", within=self.config.data.timeout_seconds + LONG_SECONDS)
            self.eval_set = from_first_rank(lambda: held_out(self.config))  # one rank downloads and tokenizes
        self.engine.eval()
        result = evaluate(
            self.engine,
            self.eval_set,
            micro_batch_size=self.config.eval.micro_batch_size or self.config.train.micro_batch_size,
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
            all_sum=self.engine.all_reduce,
            stop=self.stop_evaluation,
        )
        if result is None:
            return False
        self.evaluated = self.step
        seconds = time.perf_counter() - begin
        self.write({f"eval/{name}": value for name, value in result.as_dict().items()} | {"eval/seconds": seconds})
        log.info(
            f"step {self.step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte ({result.tokens:,} tokens, {seconds:.1f} s)"
        )
        return True

    def stop_evaluation(self) -> bool:
        self.guard.begin(f"step {self.step}: evaluation")
        return self.meet().stop

    def save(self, *, at_the_end: bool = False) -> None:
        """A checkpoint of this step; the write goes on in the background.

        None where the run is about to go back, unless this process ends before it does: then the checkpoint says so.
        """
        self.meet()  # the last loss belongs to the state
        if self.trouble and not at_the_end:
            return
        self.guard.begin(f"step {self.step}: checkpoint", within=LONG_SECONDS)
        stall = self.writer.save(manifest_of(self), self.data_state)
        self.saved = self.step
        self.write({"perf/checkpoint_stall_seconds": stall})

    def log(self) -> None:
        """One line of metrics over the steps since the last; a collective."""
        interval, self.interval = self.interval, Interval(self.device)
        if not interval.good_steps:
            return
        loss = float(self.engine.all_reduce(interval.loss / interval.good_steps)) / self.world_size
        rates = group_rates(self.schedule, self.run.groups, self.step)
        speed = interval.speed(
            tokens_per_step=self.config.tokens_per_step,
            flops_per_token=self.flops,
            world_size=self.world_size,
            peak=self.peak,
        )
        self.write(
            {
                **loss_metrics(loss),
                "train/lr": rates[0],
                **{f"train/lr_{group.name}": rate for group, rate in zip(self.run.groups[1:], rates[1:], strict=True)},
                "train/grad_norm": interval.grad_norm,
                "train/tokens": self.tokens,
                **speed,
                "perf/peak_memory_gib": peak_memory_bytes() / 2**30,
                **data_metrics(self.data_counts),
            }
        )
        shown = {
            "loss": f"{loss:.3f}",
            "ppl": f"{math.exp(min(loss, 700.0)):.1f}",
            "tok_s": f"{speed['perf/tokens_per_second']:,.0f}",
        }
        self.progress.show(**shown)

    # ---- helpers ----------------------------------------------------------------------------------------------

    def write(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, values)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.progress.close()
        self.data.close()
        self.writer.wait()
        if self.metrics is not None:
            self.metrics.close()


def micro_batches(batch: Batch, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """input_ids and labels [micro, T] (document_ids as well where attention is masked), on the device"""
    for start in range(0, len(batch.input_ids), size):
        piece = slice(start, start + size)
        documents = None if batch.document_ids is None else batch.document_ids[piece].to(device)
        yield batch.input_ids[piece].to(device), batch.labels[piece].to(device), documents
