"""Runs tasks of lm-evaluation-harness, which is imported only here, and reports their scores."""

import contextlib
import functools
import importlib.util
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from relora_mora.system.bars import is_watched
from relora_mora.system.files import append_synced, disk_faults_named, without_disk_errors
from relora_mora.system.logs import counted, log
from relora_mora.system.run_folder import RunFolder
from relora_mora.weights.foreign import positions_in

Results = dict[str, dict[str, float]]  # by task and metric
SEED = 1234  # of lm-eval
ANSWER_TOKENS = 256  # default of lm-eval's HFLM for a task without a limit


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


@dataclass(frozen=True)
class Ranks:
    """How ranks share the rows of a task; the defaults are those of one process.

    ``gather`` returns the values of all ranks. ``any_runs`` is called by all ranks together and says whether one of
    them is still running.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    any_runs: Callable[[bool], bool] = lambda running: running


ALONE = Ranks()


def check_tasks(settings: TaskSettings) -> None:
    """Raises :class:`HarnessError` if lm-eval is not installed, a local task cannot use its rows, or no task uses
    ``task_data``."""
    at = settings.at
    data = settings.task_data
    num_fewshot = settings.num_fewshot
    local = set(settings.tasks) & set(LOCAL_TASKS)
    if data is not None and not local:
        raise HarnessError(
            f"{at}task_data: {', '.join(settings.tasks)} has no local task ({', '.join(LOCAL_TASKS)}); leave it out"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(f"{at}tasks: lm-evaluation-harness is not installed; run pip install 'relora_mora[eval]'")
    for name in local:
        if data is None:
            raise HarnessError(f"{name}: needs {at}task_data: give its file of rows, or the folder of that file")
        rows = local_rows(name, data)
        if num_fewshot is not None and len(rows) <= num_fewshot:
            raise HarnessError(
                f"{at}num_fewshot: got {num_fewshot}, and {name} has {counted(len(rows), 'row')} including the one "
                "that is asked; give fewer, or more rows"
            )


class Tasks:
    """Tasks of lm-eval and of :data:`LOCAL_TASKS`, loaded with their data for models with so many ``positions``.

    Raises :class:`HarnessError` for unknown names, and for tasks that cannot be loaded.
    """

    def __init__(self, settings: TaskSettings, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
        check_tasks(settings)
        self.settings = settings

        def loadable(name: str) -> Any:
            """What lm-eval loads: the settings of a local task, or the name of one of its own."""
            if name not in LOCAL_TASKS:
                return name
            return local_task(name, settings.task_data or "", tokenizer.tokenize, settings.limit)

        names = settings.tasks
        with _quiet():
            self._manager = _manager(include_defaults=not set(names) <= set(LOCAL_TASKS))
            known = {*LOCAL_TASKS, *self._manager.all_tasks}
            unknown = [name for name in names if name not in known and not _is_task_file(name)]
            if unknown:
                raise HarnessError(
                    f"{settings.at}tasks: lm-eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists its "
                    f"tasks, the local ones are {', '.join(LOCAL_TASKS)}, and a task of your own is a YAML file"
                )
            self._tasks = _load_tasks(self._manager, {name: loadable(name) for name in names})
        _check_answers_fit(self._tasks, positions)
        for task in _leaves(self._tasks):  # as simple_evaluate of lm-eval does
            own = task.config.num_fewshot
            if own != 0:
                task.set_config("num_fewshot", own or 0 if settings.num_fewshot is None else settings.num_fewshot)
            task.set_fewshot_seed(seed=SEED)

    @property
    def larger_is_better(self) -> dict[str, bool]:
        """The metrics that :meth:`score` reports, as TASK/METRIC."""
        found: dict[str, bool] = {}
        for item in self._tasks:
            groups = [item, *item.get_all_groups()] if _is_group(item) else []
            for task in _leaves([item]):
                filters = [each["name"] for each in task.config.filter_list or [{"name": "none"}]]
                for metric, larger in task.higher_is_better().items():
                    totals = [group.name for group in groups if _adds_up(group, task, metric)]
                    names = [f"{name}/{_named(metric, each)}" for name in (task.task_name, *totals) for each in filters]
                    found |= dict.fromkeys(names, bool(larger))
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
            results = evaluate(
                model, self._manager.load(self._tasks), self.settings.limit, bootstrap_iters=0, log_samples=False
            )
        if cuts:
            log.warning(
                "prompts were too long for the model's %s positions and lost their beginning (%s); give %s",
                positions,
                counted(len(cuts), "time"),
                "fewer few-shot rows" if self.settings.num_fewshot else "a model with more positions, or shorter rows",
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
            ranks.any_runs(True)

        hook = lm.register_forward_pre_hook(before)
        try:
            answers = answer(own) if own else []
        finally:
            hook.remove()
        while ranks.any_runs(False):
            lm(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=lm.device))
        asked = xxhash.xxh3_64_hexdigest(repr([request.args for request in requests]).encode())
        digests, parts = zip(*ranks.gather((asked, iter(answers))), strict=True)  # a list iterator can be pickled
        if len(set(digests)) > 1:
            raise same_on_all_ranks(
                HarnessError("eval.tasks: ranks have different rows; give all hosts the same files and packages")
            )
        return [next(parts[owner]) for owner in owners]

    return answers_of_all


def _is_task_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _is_group(item: Any) -> bool:
    return hasattr(item, "get_all_tasks")


def _leaves(items: Sequence[Any]) -> list[Any]:
    """The tasks in tasks and groups."""
    return [task for item in items for task in (item.get_all_tasks() if _is_group(item) else [item])]


def _adds_up(group: Any, task: Any, metric: str) -> bool:
    """Whether a group has a total of this metric of this task."""
    return task in group.get_all_tasks() and any(each.metric == metric for each in group.aggregate_metric_list or ())


@functools.cache
def _manager(*, include_defaults: bool) -> Any:
    """Knows lm-eval's tasks by name; it reads the files of thousands of them."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _load_tasks(manager: Any, tasks: Mapping[str, Any]) -> list[Any]:
    """Loads tasks and groups of lm-eval with their data, each once. Raises :class:`HarnessError`."""
    loaded_tasks: dict[str, Any] = {}
    group_members: set[str] = set()
    missing: list[str] = []
    for name, loadable in tasks.items():
        try:
            loaded = manager.load([loadable])
        except Exception as error:  # hubs, files and datasets raise nearly any kind
            missing.append(f"{name}: cannot be loaded ({' '.join(str(error).split()):.200})")
        else:
            group_members |= {child for children in loaded["group_map"].values() for child in children}
            loaded_tasks |= {**loaded["groups"], **loaded["tasks"]}
    if missing:
        raise HarnessError("; ".join(missing))
    return [task for name, task in loaded_tasks.items() if name not in group_members]


def _check_answers_fit(tasks: Sequence[Any], positions: int | None) -> None:
    for task in _leaves(tasks):
        config = task.config
        if positions is None or config.output_type != "generate_until":
            continue
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
    """Hides the messages of lm-eval and its libraries about their internals; yields those about prompts that it cut."""
    model = logging.getLogger("lm_eval.models.huggingface")
    loggers = [model, *map(logging.getLogger, ("lm_eval", "accelerate", "datasets", "huggingface_hub"))]
    levels = [each.level for each in loggers]
    cuts: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        cuts.extend([record.getMessage()] * ("truncat" in record.getMessage().lower()))
        return False

    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        model.setLevel(logging.WARNING)
        model.addFilter(collect)
        if not is_watched():
            _draw_no_bars()
        yield cuts
    finally:
        model.removeFilter(collect)
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _draw_no_bars() -> None:
    """Of lm-eval and datasets, which draw them for every rank and into every file."""
    import datasets
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    for module in (model, task, huggingface):
        module.tqdm = lambda *items, **options: tqdm(*items, **{**options, "disable": True})
    datasets.disable_progress_bars()


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
    """Appends a line to ``tasks.jsonl`` in a run folder, and adds points to its TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    folder = RunFolder(run)
    plain = TaskSettings(settings.tasks).tagged(results)
    line = {"step": step, "time": time.time(), "num_fewshot": settings.num_fewshot, "limit": settings.limit, **plain}
    append_synced(folder.tasks, json.dumps(line))
    threading.excepthook = without_disk_errors
    with disk_faults_named(folder.tensorboard), SummaryWriter(str(folder.tensorboard)) as writer:
        for tag, value in settings.tagged(results).items():
            writer.add_scalar(tag, value, step)
