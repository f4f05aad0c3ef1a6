"""Evaluations between steps: the held-out loss, generated answers and tasks, and which of them was the best."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from relora_mora.config.checks.data import SHARES
from relora_mora.data.held_out import EvalSet
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, sum_over_hosts
from relora_mora.evaluation.generation import Generated, generate_answers
from relora_mora.evaluation.harness import Results, Tasks
from relora_mora.evaluation.loss import EvalResult, Ranks, evaluate, held_out
from relora_mora.supervise.guard import LONG_SECONDS
from relora_mora.system.logs import log
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.train.begin.settings import task_settings
from relora_mora.train.log import report
from relora_mora.train.loop.events import Parts, is_due
from relora_mora.train.loop.step import DataFailed, Stopping
from relora_mora.train.state.run_state import Best, RunState
from relora_mora.weights.generation import generation_config


class Evaluating:
    """Evaluates the held-out loss of each set and of all sets, and tasks; for any number of ranks, every token and row
    counts once."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config = parts.config
        self.engine = parts.run.engine
        self.folder = parts.run.inputs.folder
        self.tasks = parts.run.inputs.tasks
        self.sets: dict[str, EvalSet] = {}  # by name
        limits = self.config.eval
        self.micro_batch_size = limits.micro_batch_size or self.config.train.micro_batch_size
        of_tasks = limits.every_steps if limits.tasks_every_steps is None else limits.tasks_every_steps
        self.intervals = [limits.every_steps, of_tasks] if self.tasks else [limits.every_steps]

    def __call__(self, state: RunState) -> None:
        """Evaluates if it is due and this step has no evaluation yet. A collective.

        Raises :class:`Stopping` if the ranks stop during an evaluation.
        """
        if state.evaluated != state.step and any(self._is_due(every, state.step) for every in self.intervals):
            self.evaluate(state)

    def _is_due(self, every_steps: int, step: int) -> bool:
        return step in (0, self.config.train.steps) or is_due(every_steps, step)

    def read(self) -> None:
        """Reads the held-out text; a collective that no signal interrupts.

        Raises :class:`DataFailed` on all ranks if it cannot be read.
        """
        data, limits = self.config.data, self.config.eval
        self.parts.guard.begin("reading the validation data", within=data.timeout_seconds + LONG_SECONDS)
        # as relora-mora evaluate: the tokenizer in the run folder has the chat template of the training
        read = partial(held_out, data, str(self.folder.tokenizer), limits.max_tokens, limits.generate)
        try:  # only one rank downloads and tokenizes
            self.sets = from_first_rank(read)
        except (ValueError, OSError) as error:
            raise DataFailed([error]) from error

    def evaluate(self, state: RunState) -> None:
        begin = time.perf_counter()
        step = state.step
        self.engine.eval()
        results: dict[str, EvalResult] = {}
        generated: dict[str, Generated] = {}
        scores: Results = {}
        if self._is_due(self.intervals[0], step):
            with self.parts.bar("evaluation", "token") as bar:
                results = evaluate(
                    self.engine,
                    self.sets,
                    micro_batch_size=self.micro_batch_size,
                    device=self.engine.device,
                    shrinks=not self.parts.run.inputs.setup.compiles,
                    ranks=self._ranks(f"step {step}: evaluation"),
                    progress=bar.update,
                )
            with self.parts.bar("generating answers"):
                generated = self._generate(step)
        if self.tasks is not None and self._is_due(self.intervals[-1], step):
            with self.parts.bar("tasks"):
                scores = self._score_tasks(self.tasks, step)
        self._report(state, results, generated, scores, time.perf_counter() - begin)
        state.evaluated = step

    def _generate(self, step: int) -> dict[str, Generated]:
        """Generates the answers of each set, and adds the total under "". A collective."""
        self.engine.keep_merged()
        results = {
            name: generate_answers(
                self.engine.lm,
                data.answers,
                tokenizer=self.parts.run.inputs.tokenizer,
                batch_size=self.micro_batch_size,
                device=self.engine.device,
                # a round generates the whole length of an answer
                ranks=self._ranks(f"step {step}: evaluation", within=LONG_SECONDS),
            )
            for name, data in self.sets.items()
            if data.answers
        }
        return {**results, "": Generated.of_all(results.values())} if results else {}

    def _score_tasks(self, tasks: Tasks, step: int) -> Results:
        """The same results on all ranks. A collective."""
        lm = self.engine.lm
        tokenizer = load_tokenizer(self.folder.tokenizer)
        lm.generation_config = generation_config(tokenizer, lm.config, self.folder)  # as in an export
        self.engine.keep_merged()
        ranks = self._ranks(f"step {step}: tasks", within=LONG_SECONDS)
        return tasks.score(lm, tokenizer, batch_size=self.micro_batch_size, ranks=ranks)

    def _ranks(self, what: str, within: float | None = None) -> Ranks:
        """The ranks of this run, which raise :class:`Stopping` before a batch if one was asked to stop."""
        engine, guard = self.engine, self.parts.guard

        def go_on(running: bool) -> bool:
            guard.begin(what, within=within)
            stopping, busy = sum_over_hosts([float(guard.stop_reason is not None), float(running)])
            if stopping:
                raise Stopping
            return busy > 0

        return Ranks(engine.rank, engine.world_size, engine.all_reduce, gather_from_ranks, go_on)

    def _report(
        self,
        state: RunState,
        results: Mapping[str, EvalResult],
        generated: Mapping[str, Generated],
        scores: Results,
        seconds: float,
    ) -> None:
        step = state.step
        if results:
            results = {**results, "": EvalResult.of_all(results.values())}
        metrics = {
            **report.eval_metrics(results),
            **report.eval_metrics(generated),
            **task_settings(self.config.eval).tagged(scores),
        }
        if step > 0:  # which has no checkpoint
            state.best = from_first_rank(lambda: self._best(state, metrics))
        best = {} if state.best is None else {"checkpoint/best": asdict(state.best)}
        self.parts.metrics.write(step, {**metrics, **best, "eval/seconds": seconds})
        for name, result in results.items():
            label = f"validation on {name}:" if name else "validation"
            log.info(f"step {step}: {label} {result} ({result.tokens:,} tokens, {seconds:.1f} s)")
        if generated:
            log.info(f"step {step}: {generated['']}")
        for task, values in scores.items():
            log.info(f"step {step}: {task}: {', '.join(f'{name} {value:.4f}' for name, value in values.items())}")
        if state.best is not None and state.best.step == step:
            log.info(f"step {step}: the best {state.best.metric} so far")

    def _best(self, state: RunState, metrics: Mapping[str, Any]) -> Best | None:
        """The best evaluation so far: that of the current step if none before was as good, on the same tokens."""
        metric = self.config.checkpoint.keep_best or ""
        group, _, name = metric.partition("/")
        of_tasks = group == "tasks"
        suffix = task_settings(self.config.eval).suffix if of_tasks else ""
        value = metrics.get(metric + suffix)
        if value is None or not math.isfinite(value):
            return state.best
        larger = self.tasks.larger_is_better[name] if of_tasks and self.tasks else name.rpartition("/")[2] in SHARES
        digest = metrics.get(f"{metric.rpartition('/')[0]}/digest", suffix or None)
        new = Best(metric, value, state.step, digest)
        old = state.best
        if old is not None and old.digest == new.digest and not (value > old.value if larger else value < old.value):
            return old
        return new
