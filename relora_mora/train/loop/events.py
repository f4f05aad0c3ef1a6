"""Events between steps. Each one knows when it is due, and the loop calls all of them after every step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from relora_mora.adapters.mora import operator_in_use
from relora_mora.checkpoint.layout import Manifest
from relora_mora.checkpoint.mirror import Mirror
from relora_mora.checkpoint.writer import CheckpointWriter
from relora_mora.config.schema import Config
from relora_mora.data.stream.producer import mixture_names
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, sum_over_hosts
from relora_mora.optim.groups import group_rates
from relora_mora.sizing.measure import flops_per_token
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.bars import Bar, is_watched
from relora_mora.system.hardware import peak_flops, peak_memory_bytes
from relora_mora.system.logs import log
from relora_mora.train.begin.build import Run
from relora_mora.train.log import report
from relora_mora.train.log.loggers import make_loggers
from relora_mora.train.state.run_state import Interval, RunState, TrainingError


@dataclass(frozen=True)
class Parts:
    """A run, and what its events write to."""

    run: Run
    guard: Guard
    metrics: report.Metrics
    steps: Bar
    writer: CheckpointWriter
    mirror: Mirror | None

    @property
    def config(self) -> Config:
        return self.run.config

    def bar(self, title: str, unit: str = "") -> Bar:
        """A bar below the one of the steps."""
        return Bar(title, unit, show=self.config.log.progress)


def open_parts(run: Run, guard: Guard, mirror: Mirror | None) -> Parts:
    """The parts of a run that is built; ``mirror`` only on the first rank. A collective."""
    config, folder = run.config, run.inputs.folder
    is_first = run.engine.rank == 0
    metrics = report.Metrics(folder.path, make_loggers(folder.path, config.log), writes=is_first)
    writer = CheckpointWriter(
        folder.checkpoints,
        run.engine,
        run.base,
        tokenizer=folder.tokenizer,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        sync_beside=metrics.sync,
    )
    if mirror is not None:
        mirror.start()
    steps = Bar("", "step", total=config.train.steps, show=config.log.progress)
    return Parts(run, guard, metrics, steps, writer, mirror)


EARLY_LINES = 10  # on a terminal, that many first steps of a start have a line each


def is_due(every_steps: int, step: int) -> bool:
    """0 means never."""
    return every_steps > 0 and step % every_steps == 0


def merge(parts: Parts, state: RunState) -> None:
    """Merges the adapters into the frozen weights if it is due.

    A run leaves out the merge after its last step, and its export includes it instead; a longer run makes it first.
    """
    run, step = parts.run, state.step
    merges_done = run.schedule.merges_done(step)
    if merges_done <= run.merger.merges_done:
        return
    parts.guard.begin(f"step {step}: merge", within=LONG_SECONDS)
    parts.writer.wait_for_base()
    gather_from_ranks(None)  # waits in the group whose timeout allows for slow disks
    record = run.merger.merge(step, merges_done, run.schedule.operator(step))
    parts.metrics.write(step, report.merge_metrics(record))
    if record.effective_rank:  # not measured at every one of frequent merges; log as rarely
        log.info(f"step {step}: merge {merges_done}, {record.summary()}")


class Reporting:
    """Writes a line of metrics over the steps since the last one, before the checkpoint and before anything that a
    signal may interrupt: otherwise a resume would lose the line."""

    def __init__(self, parts: Parts) -> None:
        self.run = parts.run
        self.config = parts.config
        self.sources = mixture_names(self.config.data) if self.config.data.is_mixture else ()
        self.metrics = parts.metrics
        self.steps = parts.steps
        self.early_lines = from_first_rank(lambda: EARLY_LINES if self.config.log.progress and is_watched() else 0)

    def __call__(self, state: RunState) -> None:
        """A collective. The first lines on a terminal show the loss of one step, and metrics the mean since the last
        line."""
        early = self.early_lines > 0
        if early:
            self.early_lines -= 1
            self._show(state.step, self._over_ranks(state.interval.last_loss), self._speed(state.interval))
        if not is_due(self.config.log.every_steps, state.step) and state.step != self.config.train.steps:
            return
        interval = state.interval
        state.interval = Interval()
        if not interval.good_steps:
            return
        loss = self._over_ranks(interval.loss / interval.good_steps)
        groups = self.run.groups
        rates = group_rates(self.run.schedule, groups, state.step)
        speed = self._speed(interval)
        self.metrics.write(
            state.step,
            {
                "train/loss": loss,
                "train/perplexity": math.exp(min(loss, 700.0)),
                "train/lr": rates[0],
                **{f"train/lr_{group.name}": rate for group, rate in zip(groups[1:], rates[1:], strict=True)},
                "train/grad_norm": interval.grad_norm,
                "train/tokens": state.tokens,
                **speed,
                "perf/peak_memory_gib": peak_memory_bytes() / 2**30,
                **report.data_metrics(interval.data_counts, self.sources, self.config.data.sequence_length),
            },
        )
        if not early:
            self._show(state.step, loss, speed)

    # what takes seconds to measure is measured for the first line, and not before the first step

    @cached_property
    def flops_per_token(self) -> float:
        return flops_per_token(self.run.inputs.model_config, self.config)

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s of one device: from the settings, known, or measured."""
        if self.config.log.peak_tflops is not None:
            return self.config.log.peak_tflops * 1e12
        peak, source = peak_flops(bf16=self.run.inputs.setup.bf16)
        log.info("peak of one device: %.3g TFLOP/s (%s)", peak / 1e12, source)
        return peak

    def _over_ranks(self, loss: float) -> float:
        [total] = sum_over_hosts([loss])
        return total / self.run.engine.world_size

    def _show(self, step: int, loss: float, speed: Mapping[str, float]) -> None:
        is_unknown = math.isnan(loss)  # a step that was skipped, or has no token to score
        if is_unknown or not self.config.log.progress:
            return
        perplexity = math.exp(min(loss, 700.0))
        tokens_per_second = f"{speed['perf/tokens_per_second']:,.0f} tokens/s"
        of_step = f"step {step}/{self.config.train.steps}"
        left = self.steps.time_left()
        log.info(f"{of_step}: loss {loss:.3f}, perplexity {perplexity:.1f}, {tokens_per_second}, {left} left")

    def _speed(self, interval: Interval) -> dict[str, float]:
        seconds = interval.step_seconds + interval.data_seconds
        tokens_per_second = interval.steps * self.config.tokens_per_step / seconds
        achieved = tokens_per_second * self.flops_per_token / self.run.engine.world_size
        return {
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": seconds / interval.steps,
            "perf/data_wait_seconds": interval.data_seconds / interval.steps,
            "perf/tflops_per_device": achieved / 1e12,
            "perf/mfu": achieved / self.peak_flops,
        }


def save_if_due(parts: Parts, state: RunState) -> None:
    """Saves a checkpoint at its interval, and of the best evaluation so far."""
    is_best = state.best is not None and state.best.step == state.step
    if is_best or is_due(parts.config.checkpoint.every_steps, state.step):
        save(parts, state)


def save(parts: Parts, state: RunState) -> None:
    """Starts a checkpoint, which is written in the background; a collective."""
    parts.guard.begin(f"step {state.step}: checkpoint", within=LONG_SECONDS)
    stall = parts.writer.save(_manifest(parts.run, state), state.data)
    state.saved = state.step
    parts.metrics.write(state.step, {"perf/checkpoint_stall_seconds": stall})


def save_final(parts: Parts, state: RunState) -> None:
    """Makes sure that there is a complete checkpoint of this step.

    A collective. Raises :class:`TrainingError` on all ranks if it could not be written.
    """
    if state.step > 0 and state.saved != state.step:
        save(parts, state)
    parts.guard.begin(f"step {state.step}: waiting for the checkpoint", within=LONG_SECONDS)
    parts.writer.wait()
    if parts.mirror is not None:
        parts.mirror.close()
    failures = [failure for failure in gather_from_ranks(parts.writer.last_failure) if failure]
    if failures:
        remedy = "check the disk (df, df -i); then the same command continues from the newest checkpoint"
        raise TrainingError(f"{failures[0]}; {remedy}")


def _manifest(run: Run, state: RunState) -> Manifest:
    """The manifest of a checkpoint. The writer adds its files and the positions in the data."""
    engine = run.engine
    return Manifest(
        step=state.step,
        merges_done=run.merger.merges_done,
        operator=operator_in_use(engine.lm),
        world_size=engine.world_size,
        zero_stage=engine.stage,
        group_steps=engine.group_steps(),
        parameters={name: list(engine.shapes[name]) for name in engine.moments},
        frozen={name: list(engine.shapes[name]) for name in run.base.owner},
        data_state={},
        counters=state.dump(engine.world_size),
        files={},
        matrix_states=engine.matrix_shapes,
        **vars(run.inputs.identity),
    )
