"""Evaluates a checkpoint, an export or any Hugging Face causal LM: its held-out loss, or its scores in lm-eval tasks.

The output ends with a line of JSON.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from relora_mora.cli.arguments import NonNegativeInt, PositiveInt, Precision
from relora_mora.system.bars import Bar
from relora_mora.system.process import many_imports


def main(
    model: str,
    *,
    data: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
    max_tokens: PositiveInt | None = None,
    micro_batch_size: PositiveInt = 8,
    precision: Precision = "float32",
    tasks: str | None = None,
    task_data: str | None = None,
    num_fewshot: NonNegativeInt | None = None,
    limit: PositiveInt | None = None,
    **overrides: str,
) -> None:
    """Scores text or tasks with a model.

    Several sets of text are scored separately and all together. The last line of the output is JSON.

    Arguments:
        model: a checkpoint or run folder of this trainer (RUN/best: the one that checkpoint.keep_best kept), the folder
            of any Hugging Face causal language model, or the folder of an adapter in the format of PEFT or of the
            released MoRA code
        overrides: how the text is read, as --data.KEY=VALUE, for instance --data.sequence_length=512,
            --data.document_mask=true or --data.records.kind=question. The defaults are the settings of the training,
            or else those in docs/settings.md, with the model's maximum up to 2048 as sequence_length

    Model:
        base: the model that an adapter was trained on; default: the folder that its config names
        tokenizer: folder or .model file; default: the model's own
        precision: the precision of the weights
        micro_batch_size: sequences per forward pass

    Text:
        data: source of the text, or YAML of sets by name as in data.validation; default: the run's held-out text
        max_tokens: predicted tokens to score in each set, in whole documents; default: all

    Tasks:
        tasks: names of lm-evaluation-harness tasks or YAML files of tasks, separated by commas, to score instead of
            text; docs/tasks.md
        task_data: the rows of local tasks: a folder or a file of JSON lines
        num_fewshot: rows with their answers before each row of a task; default: what the task defines, else none
        limit: rows of each task to score; default: all

    Example:
        relora-mora evaluate runs/demo/run --data='runs/demo/data/validation/*.json.gz'
    """
    from relora_mora.config.load import SCORING, parse_typed, read_data

    sources = None if data is None else parse_typed(data, "--data")
    # parts of data.records may override the run's own settings, which are not known before the run is read
    early = {name: value for name, value in overrides.items() if not name.startswith("data.records.")}
    read_data({"train": "none", "validation": "none" if sources is None else sources}, early, SCORING)
    task_options: dict[str, Any] = {"task_data": task_data, "num_fewshot": num_fewshot, "limit": limit}
    text_options = {"data": data, "max_tokens": max_tokens, **overrides}
    unused = [name for name, value in (task_options if tasks is None else text_options).items() if value is not None]
    if unused:
        reason = "only used with --tasks" if tasks is None else "only used for text, and --tasks scores no text"
        raise ValueError(f"--{unused[0]}: {reason}; leave it out")
    with many_imports():  # takes seconds, so arguments are checked first
        import torch

        from relora_mora.evaluation.harness import Tasks, TaskSettings, check_tasks, record, table
        from relora_mora.evaluation.loss import EvalResult, held_out
        from relora_mora.evaluation.score import (
            on_device,
            ready_to_generate,
            score_sets,
            table_of_sets,
            tokenizer_of,
        )
        from relora_mora.model.config import check_length, positions_in
        from relora_mora.model.guard import compared_by_tests, examine
        from relora_mora.system.logs import counted
        from relora_mora.weights.foreign import is_foreign
        from relora_mora.weights.load import find_model
        from relora_mora.weights.peft import is_adapter

    if tasks is not None:
        to_score = TaskSettings([name.strip() for name in tasks.split(",")], **task_options)
        check_tasks(to_score)
    elif sources is None and (is_foreign(Path(model)) or is_adapter(Path(model))):
        raise ValueError(f"--data: {model} is not a run and names no text; give text to score, e.g. allenai/c4")
    source = find_model(Path(model), None if base is None else Path(base))
    dtype = getattr(torch, precision)
    if tasks is not None:
        lm, own_tokenizer = ready_to_generate(source, dtype, tokenizer)
        scorer = Tasks(to_score, own_tokenizer, positions_in(lm.config))
        scores = scorer.score(lm, own_tokenizer, batch_size=micro_batch_size)
        print(f"{source.description}\n{table(scores)}", file=sys.stderr)
        print(json.dumps({"tasks": scores}), flush=True)
        if source.checkpoint is not None and source.run is not None and source.run.config.is_file():
            record(source.run.path, source.checkpoint[1], scores, to_score)
        return
    settings = source.data_settings(sources, overrides, own_tokenizer=tokenizer is None)
    masked = settings.masks_documents_of(settings.sources("validation"))
    if "data.document_mask" in overrides and masked and not settings.document_mask:
        raise ValueError("--data.document_mask: records that are packed whole are always masked; leave it out")
    text_config = source.config.get_text_config()
    check_length(text_config, settings.sequence_length, model, separate_documents=masked)
    if masked and not compared_by_tests(text_config):
        examine(text_config, attention="auto", documents=True)
    with Bar("reading the text"):
        sets = held_out(settings, str(tokenizer_of(source, tokenizer)), max_tokens)
    lm = on_device(source, dtype)
    tokens = sum(each.predicted for each in sets.values())
    documents = counted(sum(each.documents for each in sets.values()), "document")
    print(
        f"{source.description}: {tokens:,} tokens of {documents} in sequences of {settings.sequence_length}"
        f"{', each document by itself' if masked else ''}",
        file=sys.stderr,
    )
    results = score_sets(lm, sets, micro_batch_size)
    total = EvalResult.of_all(results.values())
    if not math.isfinite(total.loss):
        raise ValueError(
            f"{model}: its loss in {precision} is {total.loss}; choose another --precision, or undamaged weights"
        )
    if total.bits_per_byte is not None:
        print("compare models that have different tokenizers by bits per byte: a loss is per token", file=sys.stderr)
    if "" in results:
        print(json.dumps(total.as_dict()))
        return
    print(table_of_sets({**results, "all sets": total}), file=sys.stderr)
    print(json.dumps({**total.as_dict(), "sets": {name: result.as_dict() for name, result in results.items()}}))
