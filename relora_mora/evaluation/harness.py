"""Runs tasks of lm-evaluation-harness, which is imported only here, and reports their scores."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora_mora.data.records.encoders import own_prefix
from relora_mora.evaluation.local_tasks import LOCAL_TASKS, HarnessError, local_rows, local_task
from relora_mora.system.files import append_synced, disk_faults_named, without_disk_errors
from relora_mora.system.logs import counted, log
from relora_mora.system.run_folder import RunFolder
from relora_mora.weights.foreign import positions_of

Results = dict[str, dict[str, float]]  # by task and metric
ANSWER_TOKENS = 256  # of a task that does not say how many, by lm-eval's HFLM


def check_tasks(names: Sequence[str], data: str | None, num_fewshot: int | None = None) -> None:
    """Raises :class:`HarnessError` where lm-eval is not installed, a local task cannot use its rows in ``data``, or no
    task of these does."""
    local = set(names) & set(LOCAL_TASKS)
    if data is not None and not local:
        raise HarnessError(
            f"--task_data: {', '.join(names)} has no local task ({', '.join(LOCAL_TASKS)}); leave it out"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError("--tasks: lm-evaluation-harness is not installed; pip install -e '.[eval]', in the checkout")
    for name in local:
        rows = [json.dumps(row, sort_keys=True) for row in local_rows(name, data)]
        copies = max(Counter(rows).values())  # of a row that is asked, none of which is an example
        if num_fewshot is not None and len(rows) - copies < num_fewshot:
            raise HarnessError(
                f"--num_fewshot: got {num_fewshot}, and {name} has {counted(len(rows), 'row')} with the one that is "
                "asked"
                f"{f' and its copies ({copies} of one)' if copies > 1 else ''}; give fewer, or more rows"
            )


def evaluate_tasks(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    data: str | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> Results:
    """Scores a model, on the device where it is, with tasks of lm-eval and of :data:`LOCAL_TASKS`.

    ``data`` has the rows of local tasks, ``limit`` is how many rows of each task count. A task of the hub whose data
    cannot be had is left out, and a warning says why. Raises :class:`HarnessError` where that is all of them, for a
    name that no task has. :func:`check_tasks` comes first.
    """
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=not set(names) <= set(LOCAL_TASKS))
        _check_names(names, manager.all_tasks)

        def tokens_of(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False).input_ids)

        positions = positions_of(lm)
        local = partial(local_task, data=data, tokens_of=tokens_of, positions=positions, limit=limit)
        found, missing = _loaded(names, manager, local)
        if not found:
            raise HarnessError("; ".join(missing))
        for text in missing:
            log.warning("left out: %s", text)
        _check_answers_fit(found, positions)
        with _cut_prompts_told(positions, num_fewshot):
            results = simple_evaluate(
                HFLM(
                    pretrained=lm,
                    tokenizer=tokenizer,
                    batch_size=batch_size,
                    max_length=positions,
                    # what a text without a context begins with: by default BOS, also where no text of training did
                    prefix_token_id=None if own_prefix(tokenizer) else tokenizer.eos_token_id,
                ),
                tasks=found,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
            )
    return {name: _numbers(values) for name, values in {**results["results"], **results.get("groups", {})}.items()}


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in LOCAL_TASKS and name not in known]
    if unknown:
        raise HarnessError(
            f"--tasks: lm-eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists those it has, and here are "
            f"also {', '.join(LOCAL_TASKS)}"
        )


def _loaded(names: Sequence[str], manager: Any, local: Callable[[str], dict[str, Any]]) -> tuple[list[Any], list[str]]:
    """Tasks and groups of lm-eval with their data, each once, and why others have none; ``local(name)`` makes ours."""
    found: dict[str, Any] = {}
    inside: set[str] = set()  # of a group
    missing: list[str] = []
    for name in names:
        try:
            loaded = manager.load([local(name) if name in LOCAL_TASKS else name])
        except Exception as error:  # whatever a hub, a file or a dataset raises
            missing.append(f"{name}: its data cannot be had ({' '.join(str(error).split()):.200})")
        else:
            inside |= {child for children in loaded["group_map"].values() for child in children}
            found |= {**loaded["groups"], **loaded["tasks"]}
    return [task for name, task in found.items() if name not in inside], missing


def _check_answers_fit(tasks: Sequence[Any], positions: int | None) -> None:
    alone = [one for task in tasks for one in (task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task])]
    for task in alone:
        config = task.config
        if positions is None or config.output_type != "generate_until":
            continue
        longest = (config.generation_kwargs or {}).get("max_gen_toks", ANSWER_TOKENS)
        if longest >= positions:
            raise HarnessError(
                f"{config.task}: its answers have up to {longest} tokens, and the model {positions} positions with the "
                "prompt; leave the task out"
            )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` as ``acc``, ``exact_match,strict`` as ``exact_match/strict``."""
    numbers = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
            numbers[metric if kind == "none" else f"{metric}/{kind}"] = float(value)
    return numbers


class _Cuts(logging.Handler):
    """Counts what lm-eval says of prompts that it cuts."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "truncat" in record.getMessage().lower()


@contextlib.contextmanager
def _cut_prompts_told(positions: int | None, num_fewshot: int | None) -> Iterator[None]:
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level, logger.propagate
    cuts = _Cuts()
    logger.addHandler(cuts)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(cuts)
        logger.level, logger.propagate = before
    if cuts.count:
        log.warning(
            "prompts were longer than the model's %s positions leave room for, and lost their beginning (%s); give %s",
            positions,
            counted(cuts.count, "time"),
            "fewer --num_fewshot" if num_fewshot else "a model with more positions, or shorter rows",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What lm-eval says while it works is about its own insides."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "accelerate", "datasets", "huggingface_hub")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


TaskScores = Mapping[str, Mapping[str, float]]


def table(results: TaskScores) -> str:
    rows = [(task, metric, f"{value:.4f}") for task, numbers in results.items() for metric, value in numbers.items()]
    rows = [("task", "metric", "value"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def record(run: Path, step: int, results: TaskScores, *, num_fewshot: int | None, limit: int | None) -> None:
    """Adds a line to ``tasks.jsonl`` of a run folder, and points to its TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    folder = RunFolder(run)
    numbers = {f"tasks/{task}/{metric}": value for task, found in results.items() for metric, value in found.items()}
    how = {"num_fewshot": num_fewshot, "limit": limit}
    append_synced(folder.tasks, json.dumps({"step": step, "time": time.time(), **how, **numbers}))
    shots = "" if num_fewshot is None else f"/{num_fewshot}-shot"
    part = "" if limit is None else f"/first-{limit}"
    threading.excepthook = without_disk_errors
    with disk_faults_named(folder.tensorboard), SummaryWriter(str(folder.tensorboard)) as writer:
        for tag, value in numbers.items():
            writer.add_scalar(f"{tag}{shots}{part}", value, step)
