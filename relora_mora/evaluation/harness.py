"""Runs tasks of lm-evaluation-harness, which is imported only here, and reports their scores."""

import contextlib
import functools
import importlib.util
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora_mora.data.records.encoders import own_prefix
from relora_mora.distributed.collectives import same_on_all_ranks
from relora_mora.evaluation.generation import attention_with_a_mask
from relora_mora.evaluation.local_tasks import LOCAL_TASKS, HarnessError, local_rows, local_task
from relora_mora.evaluation.loss import ALONE, Ranks
from relora_mora.model.config import positions_in
from relora_mora.system.bars import is_watched
from relora_mora.system.files import append_synced
from relora_mora.system.logs import counted, log
from relora_mora.system.run_folder import RunFolder

Results = dict[str, dict[str, float]]  # by task and metric
SEED = 1234  # of lm-eval
ANSWER_TOKENS = 256  # default of lm-eval's HFLM for a task without a limit
LOGGERS = ("lm_eval", "accelerate", "datasets", "huggingface_hub")


@dataclass(frozen=True)
class TaskSettings:
    """The tasks to score, the rows of local tasks, and how many rows. Messages call a setting ``at`` and its name."""

    tasks: Sequence[str]
    task_data: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    at: str = "--"  # or "eval."

    @property
    def suffix(self) -> str:
        """Ends the tags of scores that are only comparable with the same few-shot rows and limit."""
        shots = "" if self.num_fewshot is None else f"/{self.num_fewshot}-shot"
        return shots + ("" if self.limit is None else f"/first-{self.limit}")

    def tagged(self, results: Results) -> dict[str, float]:
        """The scores as metrics of a run, such as ``tasks/mmlu/acc/5-shot``."""
        scores = ((f"{task}/{metric}", value) for task, found in results.items() for metric, value in found.items())
        return {f"tasks/{name}{self.suffix}": value for name, value in scores}


def check_tasks(settings: TaskSettings) -> None:
    """Raises :class:`HarnessError` if lm-eval is not installed, or ``task_data`` does not have the rows of local
    tasks."""
    at = settings.at
    data = settings.task_data
    shots = settings.num_fewshot
    local = [name for name in settings.tasks if name in LOCAL_TASKS]
    if data is not None and not local:
        raise HarnessError(f"{at}task_data: only local tasks use it ({', '.join(LOCAL_TASKS)}); leave it out")
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(f"{at}tasks: lm-evaluation-harness is not installed; run pip install 'relora_mora[eval]'")
    for name in local:
        if data is None:
            raise HarnessError(f"{name}: needs {at}task_data: give its file of rows, or the folder of that file")
        rows = len(local_rows(name, data))
        if shots is not None and rows <= shots:
            raise HarnessError(f"{at}num_fewshot: {shots}, but {name} has only {rows - 1} further rows; give fewer")


class Tasks:
    """Tasks of lm-eval and of :data:`LOCAL_TASKS`, loaded with their data for models with so many ``positions``.

    Raises :class:`HarnessError` for unknown names, and for tasks that cannot be loaded.
    """

    def __init__(self, settings: TaskSettings, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
        check_tasks(settings)
        self.settings = settings
        data, limit = settings.task_data or "", settings.limit
        with _quiet():
            self._manager = _manager(include_defaults=not set(settings.tasks) <= set(LOCAL_TASKS))
            named = {*LOCAL_TASKS, *self._manager.all_tasks}
            unknown = [name for name in settings.tasks if name not in named and not Path(name).is_file()]
            if unknown:
                raise HarnessError(
                    f"{settings.at}tasks: lm-eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists its "
                    f"tasks, the local ones are {', '.join(LOCAL_TASKS)}, and a task of your own is a YAML file"
                )
            self._loaded: dict[str, Any] = {}  # tasks, groups and group_map
            for name in settings.tasks:
                spec = local_task(name, data, tokenizer.tokenize, limit) if name in LOCAL_TASKS else name
                try:
                    for kind, items in self._manager.load([spec]).items():
                        self._loaded.setdefault(kind, {}).update(items)
                except Exception as error:  # hubs, files and datasets raise nearly any kind
                    reason = " ".join(str(error).split())
                    raise HarnessError(f"{name}: cannot be loaded ({reason:.200})") from error
        for task in self._loaded["tasks"].values():
            _check_answers_fit(task.config, positions)
            own = task.config.num_fewshot  # from here as simple_evaluate of lm-eval does
            if own != 0:
                task.set_config("num_fewshot", own or 0 if settings.num_fewshot is None else settings.num_fewshot)
            task.set_fewshot_seed(seed=SEED)

    @property
    def larger_is_better(self) -> dict[str, bool]:
        """The metrics that :meth:`score` reports, as TASK/METRIC; of groups, those of which they have a total."""
        found: dict[str, bool] = {}
        for name, task in self._loaded["tasks"].items():
            filters = [each["name"] for each in task.config.filter_list or [{"name": "none"}]]
            for metric, larger in task.higher_is_better().items():
                totals = [
                    group.name
                    for group in self._loaded["groups"].values()
                    if name in [each.task_name for each in group.get_all_tasks()]
                    if metric in [each.metric for each in group.aggregate_metric_list or ()]
                ]
                found |= {f"{of}/{_named(metric, each)}": bool(larger) for of in (name, *totals) for each in filters}
        return found

    @torch.no_grad()
    def score(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, ranks: Ranks = ALONE
    ) -> Results:
        """Scores a model, on its device, and returns the same results on all ranks; a collective.

        ``tokenizer`` may get a padding token. The random numbers of the caller are left as they were.
        """
        positions = positions_in(lm.config)
        with (
            _quiet() as cuts,
            _seeded(lm.device),
            attention_with_a_mask(lm),
            torch.compiler.set_stance("force_eager"),  # each length would compile again
        ):
            from lm_eval import evaluate
            from lm_eval.models.huggingface import HFLM

            model = HFLM(
                pretrained=lm,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=positions,
                softmax_dtype=torch.float32,
                # the first token of a text without context: by default BOS, even if no training text began with it
                prefix_token_id=None if own_prefix(tokenizer) else tokenizer.eos_token_id,
            )
            for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(model, kind, _shared(getattr(model, kind), lm, ranks))
            # simple_evaluate would also describe the machine, which takes seconds
            results = evaluate(model, self._loaded, self.settings.limit, bootstrap_iters=0, log_samples=False)
        if cuts:
            log.warning(
                "prompts were too long for the model's %s positions and lost their beginning (%s); give shorter rows, "
                "fewer few-shot rows, or a model with more positions",
                positions,
                counted(len(cuts), "time"),
            )
        return {name: _numbers(values) for name, values in {**results["results"], **results.get("groups", {})}.items()}


def _shared(answer: Callable[[Any], list[Any]], lm: PreTrainedModel, ranks: Ranks) -> Callable[[Any], list[Any]]:
    """A method of lm-eval's model for which each rank computes the answers to its part of the rows.

    All ranks make the same number of forward passes, since ZeRO-3 gathers weights in each: a rank that is done makes
    further ones. Raises :class:`HarnessError` on all ranks if their rows differ.
    """

    def answers_of_all(requests: list[Any]) -> list[Any]:
        owners = [request.doc_id % ranks.world_size for request in requests]
        own = [request for request, owner in zip(requests, owners, strict=True) if owner == ranks.rank]

        def before(*_: Any) -> None:
            ranks.go_on(True)

        hook = lm.register_forward_pre_hook(before)
        try:
            answers = answer(own) if own else []
        finally:
            hook.remove()
        while ranks.go_on(False):
            lm(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=lm.device))
        asked = xxhash.xxh3_64_hexdigest(repr([request.args for request in requests]).encode())
        digests, parts = zip(*ranks.gather((asked, iter(answers))), strict=True)  # a list iterator can be pickled
        if len(set(digests)) > 1:
            raise same_on_all_ranks(
                HarnessError("eval.tasks: ranks have different rows; give all hosts the same files and packages")
            )
        return [next(parts[owner]) for owner in owners]

    return answers_of_all


@functools.cache
def _manager(*, include_defaults: bool) -> Any:
    """Knows lm-eval's tasks by name; it reads the files of thousands of them."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _check_answers_fit(config: Any, positions: int | None) -> None:
    if positions is None or config.output_type != "generate_until":
        return
    longest = (config.generation_kwargs or {}).get("max_gen_toks", ANSWER_TOKENS)
    if longest >= positions:
        raise HarnessError(
            f"{config.task}: its answers have up to {longest} tokens, and the model has {positions} positions for "
            "prompt and answer; leave the task out"
        )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Renames ``acc,none`` to ``acc``, and ``exact_match,strict`` to ``exact_match/strict``."""
    numbers = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
            numbers[_named(metric, kind)] = float(value)
    return numbers


def _named(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric}/{kind}"


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Hides the messages of lm-eval and its libraries about their internals; yields those about prompts that it cut.

    Bars are only drawn if somebody watches: these libraries draw them for every rank and into every file.
    """
    cuts: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        cuts.extend([record.getMessage()] * ("truncat" in record.getMessage().lower()))
        return False

    def without_bar(bar: tqdm, *items: Any, **options: Any) -> None:
        begin(bar, *items, **{**options, "disable": True})

    model = logging.getLogger("lm_eval.models.huggingface")
    levels = {each: each.level for each in [model, *map(logging.getLogger, LOGGERS)]}
    begin = tqdm.__init__
    try:
        for each in levels:
            each.setLevel(logging.WARNING if each is model else logging.ERROR)
        model.addFilter(collect)
        if not is_watched():
            tqdm.__init__ = without_bar  # type: ignore[method-assign, assignment]
        yield cuts
    finally:
        tqdm.__init__ = begin  # type: ignore[method-assign]
        model.removeFilter(collect)
        for each, level in levels.items():
            each.setLevel(level)


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seeds all generators as lm-eval does, and restores them at the end."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(0)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def table(results: Results) -> str:
    rows = [(task, metric, f"{value:.4f}") for task, numbers in results.items() for metric, value in numbers.items()]
    rows = [("task", "metric", "value"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def record(run: Path, step: int, results: Results, settings: TaskSettings) -> None:
    """Appends a line to ``tasks.jsonl`` in a run folder."""
    plain = TaskSettings(settings.tasks).tagged(results)
    line = {"step": step, "time": time.time(), "num_fewshot": settings.num_fewshot, "limit": settings.limit, **plain}
    append_synced(RunFolder(run).tasks, json.dumps(line))
