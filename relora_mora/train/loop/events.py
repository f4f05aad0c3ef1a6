"""What happens between steps: each event owns what it needs, knows when it is due, and is called by the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from relora_mora.checkpoint.layout import Manifest
from relora_mora.checkpoint.writer import CheckpointWriter
from relora_mora.config.registry import is_drawn
from relora_mora.config.schema import Config
from relora_mora.data.sets.held_out import EvalSet
from relora_mora.data.stream.mixture import mixture_names
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, sum_over_hosts
from relora_mora.evaluation.generation import Generated, generate_answers
from relora_mora.evaluation.loss import EvalResult, Update, evaluate, evaluate_sets, held_out
from relora_mora.optim.groups import group_rates
from relora_mora.sizing.flops import flops_per_token
from relora_mora.supervise.guard import LONG_SECONDS, Guard
from relora_mora.system.hardware import peak_memory_bytes
from relora_mora.system.logs import counted, log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.build import Run
from relora_mora.train.log.progress import Progress
from relora_mora.train.log.report import (
    Interval,
    Write,
    data_metrics,
    eval_metrics,
    loss_metrics,
    merge_metrics,
    peak_of_device,
)
from relora_mora.train.loop.feed import DataFailed
from relora_mora.train.state.run_state import RunState, TrainingError


def is_due(every_steps: int, step: int) -> bool:
    """0 means never."""
    return every_steps > 0 and step % every_steps == 0


class Merging:
    """Merges the adapters into the frozen weights. ``before`` is called first, where there is something to merge."""

    def __init__(self, run: Run, guard: Guard, write: Write, before: Callable[[], None]) -> None:
        self.schedule = run.schedule
        self.merger = run.merger
        self.guard = guard
        self.write = write
        self.before = before

    def after_step(self, state: RunState) -> None:
        step = state.step
        if not self.schedule.merge_after(step):
            return
        self.guard.begin(f"step {step}: merge", within=LONG_SECONDS)
        self.before()
        gather_from_ranks(None)  # waits in the group that lets a slow disk take its time
        done = self.schedule.merges_done(step)
        record = self.merger.merge(step, done, self.schedule.operator(step))
        self.write(step, merge_metrics(record))
        if not record.effective_rank:  # of frequent merges it is not measured each time; as many lines are enough
            return
        switched = ""
        if record.operator_after is not None:
            anew = " (drawn anew)" if is_drawn(record.operator_after) else ""
            switched = f", operator {record.operator_before} -> {record.operator_after}{anew}"
        log.info(f"step {step}: merge {done}, {counted(record.layers, 'layer')} in {record.seconds:.2f} s{switched}")


class Reporting:
    """A line of metrics over the steps since the last one. Comes before whatever a signal may cut short, and before the
    checkpoint that a resume begins at: else the line would be lost."""

    def __init__(self, run: Run, write: Write, progress: Progress) -> None:
        checked = run.checked
        self.tokens_per_step = run.config.tokens_per_step
        self.flops_per_token = flops_per_token(checked.model_config, run.config).total
        self.peak_flops = peak_of_device(run.config.log, bf16=checked.bf16)
        self.every_steps = run.config.log.every_steps
        self.last_step = run.config.train.steps
        self.sequence_length = run.config.data.sequence_length
        self.sources = mixture_names(run.config.data) if run.config.data.is_mixture else ()
        self.engine = run.engine
        self.groups = run.groups
        self.schedule = run.schedule
        self.write = write
        self.progress = progress

    def after_step(self, state: RunState) -> None:
        """A collective."""
        if not is_due(self.every_steps, state.step) and state.step != self.last_step:
            return
        interval = state.interval
        state.interval = Interval()
        if not interval.good_steps:
            return
        [total] = sum_over_hosts([interval.loss / interval.good_steps])
        loss = total / self.engine.world_size
        speed = self._speed(interval)
        self.write(
            state.step,
            {
                **loss_metrics(loss),
                **self._rates(state.step),
                "train/grad_norm": interval.grad_norm,
                "train/tokens": state.tokens,
                **speed,
                "perf/peak_memory_gib": peak_memory_bytes() / 2**30,
                **data_metrics(interval.data_counts, self.sources, self.sequence_length),
            },
        )
        self.progress.show(
            f"loss {loss:.3f}, perplexity {math.exp(min(loss, 700.0)):.1f}, "
            f"{speed['perf/tokens_per_second']:,.0f} tokens/s"
        )

    def _rates(self, step: int) -> dict[str, float]:
        rates = group_rates(self.schedule, self.groups, step)
        others = {f"train/lr_{group.name}": rate for group, rate in zip(self.groups[1:], rates[1:], strict=True)}
        return {"train/lr": rates[0], **others}

    def _speed(self, interval: Interval) -> dict[str, float]:
        seconds = interval.step_seconds + interval.data_seconds
        tokens_per_second = interval.steps * self.tokens_per_step / seconds
        achieved = tokens_per_second * self.flops_per_token / self.engine.world_size
        return {
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": seconds / interval.steps,
            "perf/data_wait_seconds": interval.data_seconds / interval.steps,
            "perf/tflops_per_device": achieved / 1e12,
            "perf/mfu": achieved / self.peak_flops,
        }


class Evaluating:
    """The held-out loss of each set and of all; every token once, whatever the number of ranks."""

    def __init__(self, run: Run, guard: Guard, write: Write, progress: Progress) -> None:
        self.config: Config = run.config
        self.micro_batch_size = run.config.eval.micro_batch_size or run.config.train.micro_batch_size
        self.tokenizer = run.checked.tokenizer
        self.progress = progress
        self.engine = run.engine
        self.guard = guard
        self.write = write
        self.sets: dict[str, EvalSet] = {}  # by name
        self.compiled = run.checked.compiled

    def is_missing(self, state: RunState) -> bool:
        """Whether the present step is to be evaluated and has not been."""
        due = is_due(self.config.eval.every_steps, state.step) or state.step == self.config.train.steps
        return due and state.evaluated != state.step

    def is_due_at_start(self, state: RunState) -> bool:
        """Before the first step, and where the step that the run goes on from has none: a signal cut it short, or the
        run begins with another one's checkpoint."""
        if state.step == 0:
            return self.config.eval.at_start
        return state.trouble is None and self.is_missing(state)

    def after_step(self, state: RunState) -> bool:
        """False when the ranks stop before the end of an evaluation."""
        return not self.is_missing(state) or self.evaluate(state)

    def read(self) -> None:
        """Reads the held-out text; a collective, which no signal interrupts.

        Raises :class:`DataFailed` on all ranks where it cannot be read.
        """
        self.guard.begin("reading the validation data", within=self.config.data.timeout_seconds + LONG_SECONDS)
        try:
            self.sets = from_first_rank(self._held_out)  # one rank downloads and tokenizes
        except (ValueError, OSError) as error:
            raise DataFailed([error]) from error

    def evaluate(self, state: RunState) -> bool:
        """False when the ranks stop before its end. A collective."""
        begin = time.perf_counter()
        self.engine.eval()
        with self.progress.evaluation() as progress:
            results = evaluate_sets(
                lambda data, update: self._score(data, state.step, update), self.sets, progress=progress
            )
        generated = None if results is None else self._generate(state.step)
        if results is None or generated is None:
            return False
        state.evaluated = state.step
        self._report(state.step, results, generated, time.perf_counter() - begin)
        return True

    def _held_out(self) -> dict[str, EvalSet]:
        """With the run's own tokenizer, as ``launch/evaluate.py`` has it: it writes the template that is trained on."""
        limits = self.config.eval
        tokenizer = RunFolder(Path(self.config.train.run_dir)).tokenizer
        return held_out(self.config.data, str(tokenizer), limits.max_tokens, limits.generate)

    def _score(self, data: EvalSet, step: int, update: Update) -> EvalResult | None:
        return evaluate(
            self.engine,
            data,
            micro_batch_size=self.micro_batch_size,
            shrinks=not self.compiled,
            device=self.engine.device,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            all_sum=self.engine.all_reduce,
            stop=lambda: self._stop(step),
            progress=update,
        )

    def _generate(self, step: int) -> dict[str, Generated] | None:
        """Of each set that has answers to generate, and of all as ""; None when the ranks stop before the end.

        A collective.
        """
        found: dict[str, Generated] = {}
        self.engine.keep_merged()
        for name, data in self.sets.items():
            if not data.answers:
                continue
            result = generate_answers(
                self.engine.lm,
                data.answers,
                tokenizer=self.tokenizer,
                batch_size=self.micro_batch_size,
                device=self.engine.device,
                rank=self.engine.rank,
                world_size=self.engine.world_size,
                all_sum=self.engine.all_reduce,
                stop=lambda: self._stop(step, within=LONG_SECONDS),  # of a round of as many tokens as an answer has
            )
            if result is None:
                return None
            found[name] = result
        return {**found, "": Generated.of_all(found.values())} if found else {}

    def _stop(self, step: int, within: float | None = None) -> bool:
        self.guard.begin(f"step {step}: evaluation", within=within)
        return sum_over_hosts([float(self.guard.stop_reason is not None)]) != [0.0]

    def _report(
        self, step: int, results: Mapping[str, EvalResult], generated: Mapping[str, Generated], seconds: float
    ) -> None:
        whole = EvalResult.of_all(results.values())
        metrics = eval_metrics(results) | eval_metrics({"": whole}) | eval_metrics(generated)
        self.write(step, {**metrics, "eval/seconds": seconds})
        for name, result in results.items():
            if name:
                log.info(f"step {step}: validation on {name}: {result} ({result.tokens:,} tokens)")
        log.info(f"step {step}: validation {whole} ({whole.tokens:,} tokens, {seconds:.1f} s)")
        if generated:
            log.info(f"step {step}: {generated['']}")


class Saving:
    """Checkpoints; they are written in the background."""

    def __init__(self, run: Run, writer: CheckpointWriter, guard: Guard, write: Write) -> None:
        self.every_steps = run.config.checkpoint.every_steps
        self.run = run
        self.writer = writer
        self.guard = guard
        self.write = write

    def after_step(self, state: RunState) -> None:
        if is_due(self.every_steps, state.step):
            self.save(state)

    def save(self, state: RunState) -> None:
        """A collective."""
        self.guard.begin(f"step {state.step}: checkpoint", within=LONG_SECONDS)
        stall = self.writer.save(self._manifest(state), state.data)
        state.saved = state.step
        self.write(state.step, {"perf/checkpoint_stall_seconds": stall})

    def save_the_end(self, state: RunState) -> None:
        """Returns when the newest checkpoint is whole and of this step.

        A collective. Raises :class:`TrainingError` on all ranks when it could not be written.
        """
        if state.step > 0 and state.saved != state.step:
            self.save(state)
        self.guard.begin(f"step {state.step}: waiting for the checkpoint", within=LONG_SECONDS)
        self.writer.wait()
        failures = [failure for failure in gather_from_ranks(self.writer.last_failure) if failure]
        if failures:
            remedy = f"see to the disk (df, df -i), and {self.same_command} continues from the newest checkpoint"
            raise TrainingError(f"{failures[0]}; {remedy}")

    @property
    def same_command(self) -> str:
        """What makes the run go on, in words."""
        return "the same command" + " with --train.resume=auto" * (self.run.config.train.resume == "never")

    def _manifest(self, state: RunState) -> Manifest:
        """Without files and the place in the data, which the writer adds."""
        run = self.run
        engine = run.engine
        identity: dict[str, Any] = vars(run.checked.identity)
        return Manifest(
            step=state.step,
            merges_done=run.merger.draw.merges_done,
            operator=run.merger.operator(),
            operator_seed=run.merger.draw.seed if is_drawn(run.merger.operator()) else None,
            world_size=engine.world_size,
            zero_stage=engine.stage,
            group_steps=engine.group_steps(),
            parameters={name: list(engine.shapes[name]) for names in engine.members for name in names},
            frozen={name: list(engine.shapes[name]) for name in run.base.owner},
            data_state={},
            counters=state.dump(engine.world_size),
            files={},
            matrix_states=engine.matrix_shapes,
            **identity,
        )
