"""Runs tasks of lm-evaluation-harness, which is imported only here, and reports their scores."""

import contextlib
import importlib.util
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
ANSWER_TOKENS = 256  # default of lm-eval's HFLM for a task without a limit


def check_tasks(names: Sequence[str], data: str | None, num_fewshot: int | None = None) -> None:
    """Raises :class:`HarnessError` if lm-eval is not installed, a local task cannot use its rows in ``data``, or no
    task uses ``data``."""
    local = set(names) & set(LOCAL_TASKS)
    if data is not None and not local:
        raise HarnessError(
            f"--task_data: {', '.join(names)} has no local task ({', '.join(LOCAL_TASKS)}); leave it out"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError("--tasks: lm-evaluation-harness is not installed; run pip install 'relora_mora[eval]'")
    for name in local:
        rows = [json.dumps(row, sort_keys=True) for row in local_rows(name, data)]
        copies = max(Counter(rows).values())  # copies of the evaluated row cannot be examples
        if num_fewshot is not None and len(rows) - copies < num_fewshot:
            raise HarnessError(
                f"--num_fewshot: got {num_fewshot}, and {name} has {counted(len(rows), 'row')} including the one "
                f"that is asked{f' and its copies ({copies} of one)' if copies > 1 else ''}; give fewer, or more rows"
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
    """Scores a model, on its device, with tasks of lm-eval and of :data:`LOCAL_TASKS`.

    ``data`` has the rows of local tasks. Only the first ``limit`` rows of each task count. A task whose data cannot be
    loaded is left out with a warning. Raises :class:`HarnessError` if no task is left, and for unknown names.
    :func:`check_tasks` comes first.
    """
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=not set(names) <= set(LOCAL_TASKS))
        known = {*LOCAL_TASKS, *manager.all_tasks}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise HarnessError(
                f"--tasks: lm-eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists its tasks, and the local "
                f"ones are {', '.join(LOCAL_TASKS)}"
            )

        def tokens_of(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False).input_ids)

        positions = positions_of(lm)
        local = partial(local_task, data=data, tokens_of=tokens_of, positions=positions, limit=limit)
        tasks, missing = _load_tasks(names, manager, local)
        if not tasks:
            raise HarnessError("; ".join(missing))
        for text in missing:
            log.warning("left out: %s", text)
        _check_answers_fit(tasks, positions)
        with _warn_about_cut_prompts(positions, num_fewshot):
            results = simple_evaluate(
                HFLM(
                    pretrained=lm,
                    tokenizer=tokenizer,
                    batch_size=batch_size,
                    max_length=positions,
                    # the first token of a text without context: by default BOS, even if no training text began with it
                    prefix_token_id=None if own_prefix(tokenizer) else tokenizer.eos_token_id,
                ),
                tasks=tasks,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
            )
    return {name: _numbers(values) for name, values in {**results["results"], **results.get("groups", {})}.items()}


def _load_tasks(
    names: Sequence[str], manager: Any, local: Callable[[str], dict[str, Any]]
) -> tuple[list[Any], list[str]]:
    """Loads tasks and groups of lm-eval with their data, each once, and returns them with the errors of the others.

    ``local(name)`` gives the settings of a local task.
    """
    loaded_tasks: dict[str, Any] = {}
    group_members: set[str] = set()
    missing: list[str] = []
    for name in names:
        try:
            loaded = manager.load([local(name) if name in LOCAL_TASKS else name])
        except Exception as error:  # hubs, files and datasets raise nearly any kind
            missing.append(f"{name}: its data cannot be loaded ({' '.join(str(error).split()):.200})")
        else:
            group_members |= {child for children in loaded["group_map"].values() for child in children}
            loaded_tasks |= {**loaded["groups"], **loaded["tasks"]}
    return [task for name, task in loaded_tasks.items() if name not in group_members], missing


def _check_answers_fit(tasks: Sequence[Any], positions: int | None) -> None:
    single = [one for task in tasks for one in (task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task])]
    for task in single:
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
            numbers[metric if kind == "none" else f"{metric}/{kind}"] = float(value)
    return numbers


class _CutCounter(logging.Handler):
    """Counts the messages of lm-eval about prompts that it truncates."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "truncat" in record.getMessage().lower()


@contextlib.contextmanager
def _warn_about_cut_prompts(positions: int | None, num_fewshot: int | None) -> Iterator[None]:
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level, logger.propagate
    cuts = _CutCounter()
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
            "prompts were too long for the model's %s positions and lost their beginning (%s); give %s",
            positions,
            counted(cuts.count, "time"),
            "fewer --num_fewshot" if num_fewshot else "a model with more positions, or shorter rows",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the messages of lm-eval and its libraries about their internals."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "accelerate", "datasets", "huggingface_hub")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def table(results: Results) -> str:
    rows = [(task, metric, f"{value:.4f}") for task, numbers in results.items() for metric, value in numbers.items()]
    rows = [("task", "metric", "value"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def record(run: Path, step: int, results: Results, *, num_fewshot: int | None, limit: int | None) -> None:
    """Appends a line to ``tasks.jsonl`` in a run folder, and adds points to its TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    folder = RunFolder(run)
    numbers = {f"tasks/{task}/{metric}": value for task, scores in results.items() for metric, value in scores.items()}
    line = {"step": step, "time": time.time(), "num_fewshot": num_fewshot, "limit": limit, **numbers}
    append_synced(folder.tasks, json.dumps(line))
    shots = "" if num_fewshot is None else f"/{num_fewshot}-shot"
    part = "" if limit is None else f"/first-{limit}"
    threading.excepthook = without_disk_errors
    with disk_faults_named(folder.tensorboard), SummaryWriter(str(folder.tensorboard)) as writer:
        for tag, value in numbers.items():
            writer.add_scalar(f"{tag}{shots}{part}", value, step)
