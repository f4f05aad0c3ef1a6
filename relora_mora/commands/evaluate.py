"""Evaluates a checkpoint, an export or any Hugging Face causal LM: its held-out loss, or its scores in lm-eval tasks.

The output ends with a line of JSON.
"""

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora_mora.cli.arguments import NonNegativeInt, PositiveInt, Precision
from relora_mora.system.bars import Bar
from relora_mora.system.process import many_imports

if TYPE_CHECKING:
    from relora_mora.config.data import DataConfig
    from relora_mora.data.sets.held_out import EvalSet
    from relora_mora.evaluation.harness import TaskSettings
    from relora_mora.evaluation.loss import EvalResult
    from relora_mora.weights.load import LoadedModel


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
    from relora_mora.config.data_flags import SCORING, check_names, parse_typed, read_data

    check_names(overrides, SCORING)
    task_options: dict[str, Any] = {"task_data": task_data, "num_fewshot": num_fewshot, "limit": limit}
    text_options = {"data": data, "max_tokens": max_tokens, **overrides}
    unused = [name for name, value in (task_options if tasks is None else text_options).items() if value is not None]
    if unused:
        reason = "only used with --tasks" if tasks is None else "only used for text, and --tasks scores no text"
        raise ValueError(f"--{unused[0]}: {reason}; leave it out")
    sources = None if data is None else parse_typed(data, "--data")
    # parts of data.records may override the run's own settings, which are not known before the run is read
    early = {name: value for name, value in overrides.items() if not name.startswith("data.records.")}
    text = read_data({"train": "none", "validation": "none" if sources is None else sources}, early, SCORING)
    with many_imports():  # takes seconds, so arguments are checked first
        import torch

        from relora_mora.evaluation.loss import EvalResult, held_out
        from relora_mora.model.config import check_length
        from relora_mora.model.guard import compared_by_tests, examine
        from relora_mora.system.logs import counted
        from relora_mora.tokenizer.load import load_tokenizer
        from relora_mora.weights.foreign import is_foreign
        from relora_mora.weights.load import load_model
        from relora_mora.weights.peft import is_adapter

    if tasks is not None:
        from relora_mora.evaluation.harness import TaskSettings, check_tasks

        to_score = TaskSettings([name.strip() for name in tasks.split(",")], **task_options)
        check_tasks(to_score)
    elif sources is None and (is_foreign(Path(model)) or is_adapter(Path(model))):
        raise ValueError(f"--data: {model} is not a run and names no text; give text to score, e.g. allenai/c4")
    # missing files are reported before a large model is read
    if tokenizer is not None:
        load_tokenizer(tokenizer)
    if sources is not None:
        _check_files(text)
    with Bar("loading the model"):
        loaded = load_model(Path(model), getattr(torch, precision), None if base is None else Path(base))
    if tasks is not None:
        _score_tasks(loaded, tokenizer, to_score, micro_batch_size)
        return
    settings = loaded.data_settings(sources, overrides, own_tokenizer=tokenizer is None)
    masked = settings.masks_documents_of(settings.sources("validation"))
    if "data.document_mask" in overrides and masked and not settings.document_mask:
        raise ValueError("--data.document_mask: records that are packed whole are always masked; leave it out")
    text_config = loaded.model.config.get_text_config()
    check_length(text_config, settings.sequence_length, model, separate_documents=masked)
    if masked and not compared_by_tests(text_config):
        examine(text_config, attention="auto", documents=True)
    with Bar("reading the text"):
        sets = held_out(settings, str(tokenizer_of(loaded, tokenizer)), max_tokens)
    lm = on_device(loaded)
    check_causal(lm, model)
    tokens = sum(each.predicted for each in sets.values())
    documents = counted(sum(each.documents for each in sets.values()), "document")
    print(
        f"{loaded.description}: {tokens:,} tokens of {documents} in sequences of {settings.sequence_length}"
        f"{', each document by itself' if masked else ''}",
        file=sys.stderr,
    )
    results = _score(lm, sets, micro_batch_size)
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
    print(_table({**results, "all sets": total}), file=sys.stderr)
    print(json.dumps({**total.as_dict(), "sets": {name: result.as_dict() for name, result in results.items()}}))


def _check_files(text: "DataConfig") -> None:
    """Raises SourceError if files of the text on this host are missing."""
    from relora_mora.config.data import set_setting
    from relora_mora.data.errors import SourceError
    from relora_mora.data.sources.names import hub_repo
    from relora_mora.data.sources.resolve import shards_of

    for name, sources in text.validation.items():
        if any(hub_repo(source) or "://" in source.source for source in sources):
            continue
        try:
            shards_of(sources, text, "validation")
        except SourceError as error:
            raise SourceError(f"{set_setting(name)}: {error}" if name else str(error)) from error


def on_device(loaded: "LoadedModel") -> Any:
    import torch

    from relora_mora.system.hardware import uses_cuda

    lm: Any = loaded.model  # torch's types do not know that a model accepts a device
    return lm.to(torch.device("cuda" if uses_cuda() else "cpu")).eval()


def check_causal(lm: Any, name: str) -> None:
    """Raises ValueError for a model that sees the tokens that it is to predict."""
    from relora_mora.evaluation.loss import is_causal

    if not is_causal(lm, lm.device):
        kind = type(lm).__name__
        raise ValueError(
            f"{name}: {kind} predicts a token from the token itself and later ones; give a causal language model"
        )


def _score(lm: Any, sets: Mapping[str, "EvalSet"], micro_batch_size: int) -> dict[str, "EvalResult"]:
    from relora_mora.evaluation.loss import evaluate, evaluate_sets
    from relora_mora.model.causal import LossModel
    from relora_mora.system.hardware import ran_out_of_memory

    rows = min(micro_batch_size, max(each.blocks for each in sets.values()))
    mean_loss = LossModel(lm)
    try:
        with Bar("evaluation", "token") as bar:
            return evaluate_sets(
                lambda each, update: evaluate(
                    mean_loss, each, micro_batch_size=rows, device=lm.device, progress=update
                ),
                sets,
                bar.update,
            )
    except (MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            [length] = {each.scored.shape[1] for each in sets.values()}
            raise ValueError(
                f"--micro_batch_size: {rows} x {length} tokens need more memory than available; lower it"
            ) from error
        raise


def _score_tasks(
    loaded: "LoadedModel",
    tokenizer: str | None,
    settings: "TaskSettings",
    batch_size: int,
) -> None:
    """Prints the results of tasks and, for a checkpoint in a run folder, records them there."""
    from relora_mora.evaluation.harness import Tasks, record, table
    from relora_mora.tokenizer.load import load_tokenizer
    from relora_mora.weights.foreign import positions_in
    from relora_mora.weights.generation import generation_config

    lm = on_device(loaded)
    loaded_tokenizer = load_tokenizer(tokenizer_of(loaded, tokenizer))
    if loaded.of_run:
        lm.generation_config = generation_config(loaded_tokenizer, lm.config, loaded.run)  # as in its export
    scorer = Tasks(settings, loaded_tokenizer, positions_in(lm.config))
    results = scorer.score(lm, loaded_tokenizer, batch_size=batch_size)
    print(f"{loaded.description}\n{table(results)}", file=sys.stderr)
    print(json.dumps({"tasks": results}), flush=True)
    if loaded.checkpoint is not None and loaded.run is not None and loaded.run.config.is_file():
        record(loaded.run.path, loaded.checkpoint[1], results, settings)


def tokenizer_of(loaded: "LoadedModel", other: str | None) -> Path:
    """The folder of the model's own tokenizer, or ``other`` instead; checks that its ids fit the model."""
    from relora_mora.tokenizer.identity import check_vocabulary, gives_same_tokens
    from relora_mora.tokenizer.load import load_tokenizer

    vocab_size = loaded.model.config.get_text_config().vocab_size
    path = loaded.tokenizer if other is None else Path(other)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, vocab_size)
    with contextlib.suppress(ValueError):  # the model may have no tokenizer
        if other is not None and not gives_same_tokens(other, loaded.tokenizer, tokenizer):
            print(
                f"{other} gives other tokens than the model's own tokenizer: the numbers below are meaningful only "
                "if the model was trained with it",
                file=sys.stderr,
            )
    return path


def _table(results: Mapping[str, "EvalResult"]) -> str:
    width = max(map(len, results))
    rows = [
        f"{name:<{width}} {result.tokens:>15,} {result.loss:>10.4f} {result.perplexity:>12.2f} "
        f"{'' if result.bits_per_byte is None else f'{result.bits_per_byte:.4f}':>15}"
        for name, result in results.items()
    ]
    return "\n".join([f"{'':<{width}} {'tokens':>15} {'loss':>10} {'perplexity':>12} {'bits per byte':>15}", *rows])
