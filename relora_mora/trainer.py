"""The training loop. Everything periodic is a named method beside it; what happens when follows from ``step`` alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relora_mora.build import Checked, Run, build, check, pinned_before, plain_model_config, write_run_folder
from relora_mora.checkpoint import CheckpointWriter, Manifest
from relora_mora.config import Config
from relora_mora.cycle import MergeRecord
from relora_mora.data import Batch, EvalSet, TrainStream, load_eval_set, merge_states, pin_revision
from relora_mora.evaluate import EvalResult, evaluate
from relora_mora.flops import flops_per_token
from relora_mora.hardware import peak_flops, peak_memory_bytes
from relora_mora.metrics import Metrics, Progress, log, setup_logging
from relora_mora.optim import group_rates
from relora_mora.zero import from_first_rank, init_distributed


class TrainingError(RuntimeError):
    """A run that cannot go on; the reason is for the user."""


def pretrain(config: Config) -> None:
    """Checks the settings, builds the run, trains it to its end. One call per rank."""
    rank, world_size = init_distributed()
    setup_logging(rank)
    data = from_first_rank(lambda: pin_revision(pinned_before(config)))  # one commit for all ranks and the whole run
    checked = check(config.model_copy(update={"data": data}))
    run = build(checked)
    trainer = Trainer(checked, run, rank, world_size)
    try:
        trainer.fit()
    finally:
        trainer.close()


class Interval:
    """What has been counted since the last line of metrics."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.micro_batches = self.steps = 0
        self.seconds = self.data_seconds = self.grad_norm = 0.0


class Trainer:
    def __init__(self, checked: Checked, run: Run, rank: int, world_size: int) -> None:
        config = checked.config
        self.config, self.checked, self.run, self.rank, self.world_size = config, checked, run, rank, world_size
        self.engine, self.schedule, self.device = run.engine, run.schedule, run.engine.device
        self.step, self.tokens, self.skipped = run.step, run.counters["tokens"], run.counters["skipped_steps"]
        self.folder = Path(config.train.run_dir)
        if rank == 0:
            write_run_folder(checked, world_size, run.step)
        self.metrics = Metrics(self.folder, step=run.step, tensorboard=config.log.tensorboard) if rank == 0 else None
        self.progress = Progress(total=config.train.steps, done=run.step, show=rank == 0 and config.log.progress)
        self.flops = flops_per_token(checked.model_config, config).total
        self.peak = self._peak()
        self.interval = Interval(self.device)
        self.bad_steps = 0
        # a step is evaluated before it is saved: what was resumed has both
        own = run.resumed_from is not None and run.resumed_from.folder.parent.resolve() == (self.folder / "checkpoints").resolve()
        self.evaluated = self.saved = run.step if own else None
        self.eval_set: EvalSet | None = None
        self.data = TrainStream(
            config.data,
            tokenizer_path=config.tokenizer.path,
            batch_size=config.train.batch_size,
            lanes=config.lanes,
            rank=rank,
            world_size=world_size,
            state=run.data_state,
        )
        self.data_state: dict[str, Any] = {}
        self.data_counts: dict[str, int] = {}
        self.writer = CheckpointWriter(
            self.folder / "checkpoints",
            run.engine,
            run.base,
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            merge_states=merge_states,
            report=log.error,
        )
        if own and run.resumed_from is not None:
            self.writer.adopt_base(run.resumed_from.folder, run.resumed_from.manifest)

    # ---- the loop ---------------------------------------------------------------------------------------------

    def fit(self) -> None:
        if self.step == 0 and self.config.eval.at_start:
            self.evaluate()
        while self.step < self.config.train.steps:
            batch = self.next_batch()
            self.train_step(batch)
            if self.schedule.merge_after(self.step):
                self.merge()
            if self.is_due(self.config.eval.every_steps) or self.step == self.config.train.steps:
                self.evaluate()
            if self.is_due(self.config.checkpoint.every_steps):
                self.save()
            if self.is_due(self.config.log.every_steps) or self.step == self.config.train.steps:
                self.log()
        self.finish()

    def is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0

    def next_batch(self) -> Batch:
        begin = time.perf_counter()
        batch = next(self.data)
        self.interval.data_seconds += time.perf_counter() - begin
        self.data_counts = batch.counts
        for note in batch.notes:
            log.warning("data: %s", note)
        return batch

    def train_step(self, batch: Batch) -> None:
        """One optimizer step on this rank's share of a global batch."""
        begin = time.perf_counter()
        torch.manual_seed(self.config.train.seed + self.step)  # dropout, where a model has it, follows from the step
        micro_batches = list(self.micro_batches(batch))
        losses = torch.zeros_like(self.interval.loss)
        self.engine.engine.train()
        for index, (input_ids, labels, document_ids) in enumerate(micro_batches):
            loss = self.engine.engine(input_ids, labels, document_ids)
            losses += loss.detach()
            self.engine.accumulate(loss, last=index == len(micro_batches) - 1)
        norm, applied = self.engine.step(group_rates(self.schedule, self.run.groups, self.step + 1))
        self.step += 1
        self.tokens += self.config.tokens_per_step
        self.data_state = batch.state
        if applied:
            self.interval.loss += losses
            self.interval.micro_batches += len(micro_batches)
            self.interval.grad_norm = norm
        self.interval.steps += 1
        self.interval.seconds += time.perf_counter() - begin
        self.progress.update()
        self.count_bad(norm, applied)

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """input_ids and labels [micro, T] (document_ids as well where attention is masked), on the device"""
        size = self.config.train.micro_batch_size
        for start in range(0, len(batch.input_ids), size):
            piece = slice(start, start + size)
            documents = None if batch.document_ids is None else batch.document_ids[piece].to(self.device)
            yield batch.input_ids[piece].to(self.device), batch.labels[piece].to(self.device), documents

    # ---- events -----------------------------------------------------------------------------------------------

    def count_bad(self, norm: float, applied: bool) -> None:
        """Reports a step that was not made; too many in a row end the run. All ranks see the same."""
        if applied:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.skipped += 1
        log.warning("step %d skipped on all ranks: the gradient is not finite (norm %s)", self.step, norm)
        self.write({"train/skipped_steps": self.skipped})
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise TrainingError(
                f"the gradient was not finite for {self.bad_steps} steps in a row (train.max_bad_steps), the last is step {self.step}; "
                "lower optim.lr, or resume from an older checkpoint"
            )

    def merge(self) -> None:
        self.writer.wait_for_base()
        done, operator = self.schedule.merges_done(self.step), self.schedule.operator(self.step)
        record = self.run.cycle.merge(self.step, done, operator)
        self.write(merge_metrics(record))
        switched = f", operator {record.operator_before} -> {record.operator_after}" if record.operator_after is not None else ""
        log.info(f"step {self.step}: merged {record.layers} layers in {record.seconds:.2f} s{switched}")

    def evaluate(self) -> EvalResult:
        """Held-out loss; every token of the evaluation set once."""
        begin = time.perf_counter()
        if self.eval_set is None:
            self.eval_set = load_eval_set(
                self.config.data.validation,
                config=self.config.data,
                tokenizer_path=self.config.tokenizer.path,
                sequence_length=self.config.data.sequence_length,
                max_tokens=self.config.eval.max_tokens,
            )
        self.engine.engine.eval()
        result = evaluate(
            self.engine.engine,
            self.eval_set,
            micro_batch_size=self.config.eval.micro_batch_size or self.config.train.micro_batch_size,
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
            all_sum=self.engine.all_reduce,
        )
        self.evaluated = self.step
        seconds = time.perf_counter() - begin
        self.write({f"eval/{name}": value for name, value in result.as_dict().items()} | {"eval/seconds": seconds})
        log.info(
            f"step {self.step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte ({result.tokens:,} tokens, {seconds:.1f} s)"
        )
        return result

    def save(self) -> None:
        """A checkpoint of this step; the write goes on in the background."""
        manifest = Manifest(
            step=self.step,
            merges_done=self.schedule.merges_done(self.step),
            operator=self.run.cycle.operator(),
            world_size=self.world_size,
            zero_stage=self.config.train.zero_stage,
            bf16=self.checked.bf16,
            group_steps=self.engine.group_steps(),
            parameters={name: list(self.engine.shapes[name]) for names in self.engine.members for name in names},
            frozen={name: list(self.engine.shapes[name]) for name in self.run.base.owner},
            config=self.config.model_dump(mode="json"),
            model_config=plain_model_config(self.checked.model_config),
            tokenizer_fingerprint=self.checked.tokenizer_fingerprint,
            data_fingerprint=self.checked.data_fingerprint,
            data_state={},
            counters={"tokens": self.tokens, "skipped_steps": self.skipped},
            files={},
        )
        stall = self.writer.save(manifest, self.data_state, self.folder / "tokenizer")
        self.saved = self.step
        self.write({"perf/checkpoint_stall_seconds": stall})

    def log(self) -> None:
        """One line of metrics over the steps since the last; a collective."""
        interval, self.interval = self.interval, Interval(self.device)
        if not interval.micro_batches:
            return
        loss = float(self.engine.all_reduce(interval.loss / interval.micro_batches)) / self.world_size
        elapsed = interval.seconds + interval.data_seconds
        tokens_per_second = interval.steps * self.config.tokens_per_step / elapsed
        achieved = tokens_per_second * self.flops / self.world_size
        perplexity = math.exp(min(loss, 700.0))
        rates = group_rates(self.schedule, self.run.groups, self.step)
        counts = self.data_totals()
        self.write(
            {
                "train/loss": loss,
                "train/perplexity": perplexity,
                "train/lr": rates[0],
                **{f"train/lr_{group.name}": rate for group, rate in zip(self.run.groups[1:], rates[1:], strict=True)},
                "train/grad_norm": interval.grad_norm,
                "train/tokens": self.tokens,
                "perf/tokens_per_second": tokens_per_second,
                "perf/step_seconds": elapsed / interval.steps,
                "perf/data_wait_seconds": interval.data_seconds / interval.steps,
                "perf/tflops_per_device": achieved / 1e12,
                "perf/mfu": achieved / self.peak,
                "perf/peak_memory_gib": peak_memory_bytes() / 2**30,
                "train/epoch": counts["epoch"],
                "train/documents": counts["documents"],
                "perf/data_bad_lines": counts["bad"],
                "perf/data_retries": counts["retries"],
            }
        )
        self.progress.show(loss=f"{loss:.3f}", ppl=f"{perplexity:.1f}", tok_s=f"{tokens_per_second:,.0f}")

    def finish(self) -> None:
        """Evaluates and saves the end of the run, unless that has just been done."""
        if self.evaluated != self.step:
            self.evaluate()
        if self.saved != self.step:
            self.save()
        self.writer.wait()
        failed = self.writer.last_failure
        if self.engine.sum_over_ranks(failed is not None):
            raise TrainingError(failed or "the last checkpoint failed on another rank")
        log.info(f"done: {self.step} steps, {self.tokens:,} tokens, {self.folder / 'checkpoints'}")

    def data_totals(self) -> dict[str, int]:
        """What all ranks have read; a collective. ``retries`` counts since this process started, the rest since step 0."""
        names = ("documents", "bad", "retries")
        totals = torch.tensor([self.data_counts[name] for name in names], dtype=torch.float64, device=self.device)
        return {"epoch": self.data_counts["epoch"]} | {
            name: int(total) for name, total in zip(names, self.engine.all_reduce(totals).tolist(), strict=True)
        }

    # ---- helpers ----------------------------------------------------------------------------------------------

    def write(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, values)

    def _peak(self) -> float:
        """FLOP/s of one device: a setting, known or measured."""
        if self.config.log.peak_tflops is not None:
            return self.config.log.peak_tflops * 1e12
        peak, source = peak_flops(bf16=self.checked.bf16)
        log.info("peak of one device: %.3g TFLOP/s (%s)", peak / 1e12, source)
        return peak

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.progress.close()
        self.data.close()
        self.writer.wait()
        if self.metrics is not None:
            self.metrics.close()


def merge_metrics(record: MergeRecord) -> dict[str, Any]:
    """A merge record as metrics: ``merge/delta_norm/q_proj`` and so on."""
    values: dict[str, Any] = {
        "merge/layers": record.layers,
        "merge/zeroed_elements": record.zeroed,
        "merge/seconds": record.seconds,
        "merge/operator_before": record.operator_before,
        "merge/operator_after": record.operator_after,
    }
    values |= {f"merge/delta_norm/{kind}": value for kind, value in record.delta_norm.items()}
    values |= {f"merge/effective_rank/{kind}": value for kind, value in record.effective_rank.items()}
    return {key: value for key, value in values.items() if value is not None}
