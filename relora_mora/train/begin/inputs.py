"""What a start finds out before anything is built: all checks of settings, model, text and hosts.

The first rank opens the inputs, and all ranks get the same record. What a host must have of its own each rank checks
itself, in :func:`agree`.
"""

import contextlib
import json
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from relora_mora.checkpoint.layout import CheckpointError, list_checkpoints
from relora_mora.checkpoint.mirror import Mirror
from relora_mora.checkpoint.reader import newest_manifest
from relora_mora.config.data import DataConfig, Split, set_setting
from relora_mora.config.lengths import with_counted_epochs
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config
from relora_mora.data.content import content_of, order_fingerprint, with_versions
from relora_mora.data.errors import SourceError
from relora_mora.data.first_rows import check_columns, check_lanes, check_records
from relora_mora.data.named_sets import with_commits
from relora_mora.data.read import count_epochs
from relora_mora.data.records.passages import template_in_use
from relora_mora.data.shard import Shard
from relora_mora.data.sources import configured_shards, split_remark
from relora_mora.data.tokens.make import check_tokens, tokens_of_whole_rows
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, on_all_ranks, same_on_all_ranks
from relora_mora.evaluation.harness import Tasks
from relora_mora.model.config import plain_model_config, positions_in
from relora_mora.model.guard import compared_by_tests, examine
from relora_mora.optim.own import with_rule
from relora_mora.sizing.setup import Setup
from relora_mora.supervise.guard import Guard
from relora_mora.system.bars import Bar
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.tokenizer.files import TokenizerError
from relora_mora.tokenizer.identity import check_vocabulary, gives_same_tokens, save_tokenizer, tokenizer_fingerprint
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.train.begin.files import check_files
from relora_mora.train.begin.identity import Identity, changed_settings
from relora_mora.train.begin.settings import check_machine, check_settings, memory_of_rank, setup_here, task_settings
from relora_mora.weights.load import own_tokenizer_path

T = TypeVar("T")
READING_SECONDS = 86400.0  # nobody trains several epochs on a text that takes longer than this to read once


@dataclass(frozen=True)
class Text:
    tokenizer: PreTrainedTokenizerBase
    shards: list[Shard]  # of the training data
    chat_template: str | None  # that of its first conversations; the run's tokenizer gets it


def open_text(config: Config) -> Text:
    """Loads the tokenizer and finds the shards of training and validation.

    Raises :class:`ConfigError` with everything that is missing or cannot be used.
    """
    faults: list[str] = []

    def attempt(setting: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except (TokenizerError, SourceError) as error:
            faults.append(f"{setting}: {error}")
            return None

    tokenizer = attempt("tokenizer.path", lambda: load_tokenizer(config.tokenizer_path))
    shards = attempt("data.train", lambda: _shards(config, "train", tokenizer))
    template = template_in_use(shards, tokenizer) if shards and tokenizer else None
    run_tokenizer = copy(tokenizer)
    if run_tokenizer is not None and template is not None:
        run_tokenizer.chat_template = template
    for name, sources in config.data.validation.items():
        data = config.data.model_copy(update={"validation": {"": sources}})
        one_set = config.model_copy(update={"data": data})
        attempt(set_setting(name), partial(_shards, one_set, "validation", run_tokenizer))
    if tokenizer is None or shards is None or faults:
        raise ConfigError(faults, "the settings")
    if remark := split_remark(shards, config.data):
        log.info(remark)
    return Text(tokenizer, shards, template)


def _shards(config: Config, split: Split, tokenizer: PreTrainedTokenizerBase | None) -> list[Shard]:
    data = config.data
    shards = configured_shards(data, split)
    local = [shard for shard in shards if not shard.is_remote]
    check_columns(local, data)
    if tokenizer is not None:
        check_records(local, data, tokenizer)
        check_tokens(shards, tokenizer_path=config.tokenizer_path, eos=tokenizer.eos_token_id)
    if split == "validation":
        content_of(shards)  # raises SourceError for damaged tokens
    return shards


@dataclass(frozen=True)
class Inputs:
    """The settings of a run and what they refer to. The model and the tokenizer fit, and the data exists."""

    setup: Setup
    model_config: PreTrainedConfig
    passes_boundaries: bool  # whether each layer's attention gets the boundaries of documents
    tokenizer: PreTrainedTokenizerBase  # with the chat template of the first conversations in the training data
    tokenizer_fingerprint: str
    shards: list[Shard]  # of the training data
    data_content: str  # fingerprint of the shards' content
    data_order: str
    # agreed by the ranks
    memory: float = 0.0  # bytes of the rank that has least
    tasks: Tasks | None = None  # of eval.tasks, loaded on each host
    # found in the run folder, once this run has its lock
    epochs: float | None = None  # train.epochs; once they are counted, the config has train.steps instead
    warmup_fraction: float | None = None  # optim.warmup_fraction, likewise
    checkpoint: Path | None = None  # where the run continues or begins; None: at step 0

    @property
    def config(self) -> Config:
        return self.setup.config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.train.run_dir))

    @property
    def identity(self) -> Identity:
        return Identity(
            config=self.config.model_dump(mode="json"),
            model_config=plain_model_config(self.model_config),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            eos_token_id=self.tokenizer.eos_token_id,
            data_content=self.data_content,
            data_order=self.data_order,
            bf16=self.setup.bf16,
        )


def open_inputs(config: Config, world_size: int) -> Inputs:
    """Reads and compares everything that is small; raises ValueErrors of the package that say what to do.

    Only one rank calls it. What is wrong on this machine is found before a server is asked for anything, which may take
    minutes.
    """
    check_files(config)
    setup, model_config = check_settings(config, world_size)
    config = setup.config
    passes_boundaries = True
    if not compared_by_tests(model_config):
        findings = examine(model_config, attention=config.model.attention, documents=config.data.masks_documents)
        kind = model_config.model_type
        log.info("model: the loss of a small %s differs from transformers' by %.1e", kind, findings.difference)
        passes_boundaries = findings.passes_boundaries
    data = with_commits(_with_saved_commits(config))
    config = config.model_copy(update={"data": data})
    text = open_text(config)
    tokenizer = text.tokenizer
    check_vocabulary(tokenizer, model_config.vocab_size, trained=config.model.init_from is not None)
    _check_tokenizer(config, model_config.model_type, tokenizer)
    remote = [shard for shard in text.shards if shard.is_remote]
    check_columns(remote, data)
    check_records(remote, data, tokenizer)
    shards = with_versions(text.shards, data.timeout_seconds)
    check_lanes(shards, data, config.lanes)
    tokens = tokenizer_fingerprint(config.tokenizer_path, tokenizer)
    order = order_fingerprint(
        data, tokenizer_fingerprint=tokens, batch_lanes=config.lanes, shards=shards, tokenizer=tokenizer
    )
    if text.chat_template is not None:  # the saved tokenizer, also of an export, writes what the run trains on
        tokenizer.chat_template = text.chat_template
    return Inputs(
        setup=replace(setup, config=config),
        model_config=model_config,
        passes_boundaries=passes_boundaries,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokens,
        shards=shards,
        data_content=_content(shards),
        data_order=order,
    )


def agree(inputs: Inputs, given: Config, rank: int) -> Inputs:
    """Checks what each host must have of its own, and that it is the same on all; a collective.

    ``given`` are the settings that this ``rank`` was started with. Raises :class:`ConfigError` on all ranks if one has
    other settings, or finds other files.
    """
    tasks, found = on_all_ranks(lambda: (_tasks(inputs), _found_here(inputs, given, rank)))
    hosts, of_ranks, memory = zip(*gather_from_ranks((socket.gethostname(), found, memory_of_rank())), strict=True)
    first = of_ranks[0]
    faults = []
    for number, other in enumerate(of_ranks):
        names = changed_settings(first["settings"], other["settings"])
        names += [name for name in list(first)[1:] if first[name] != other[name]]
        if names:
            faults.append(
                f"rank {number} ({hosts[number]}): {', '.join(names)}: different from the first rank ({hosts[0]}); "
                "start all ranks with the same command, and give all hosts the same files"
            )
    if faults:
        raise same_on_all_ranks(ConfigError(faults, "what the ranks found"))
    return replace(inputs, tasks=tasks, memory=min(memory))


def _found_here(inputs: Inputs, given: Config, rank: int) -> dict[str, Any]:
    """What a rank finds on its own host and must be the same on all, by its name in messages."""
    tokens = inputs.tokenizer_fingerprint
    eos = inputs.tokenizer.eos_token_id
    content = inputs.data_content
    if rank > 0:
        check_machine(inputs.model_config, inputs.setup)
        path = given.tokenizer.path or inputs.config.tokenizer_path
        tokenizer = load_tokenizer(path)
        tokens, eos = tokenizer_fingerprint(path, tokenizer), tokenizer.eos_token_id
        content = _content(inputs.shards)
    setup, _ = setup_here(with_rule(given), inputs.setup.world_size)
    return {
        "settings": setup.config.model_dump(mode="json"),
        "the tokenizer": (tokens, eos),
        "the training data": content,
        "the fast precision of the device": setup.bf16,
    }


def _content(shards: Sequence[Shard]) -> str:
    """Fingerprints of the content of local and of other shards."""
    return "".join(content_of([shard for shard in shards if shard.is_remote is remote]) for remote in (False, True))


def _tasks(inputs: Inputs) -> Tasks | None:
    """Raises HarnessError if the tasks cannot be scored, and ConfigError if they lack the metric of the best."""
    config = inputs.config
    if not config.eval.tasks:
        return None
    tasks = Tasks(task_settings(config.eval), inputs.tokenizer, positions_in(inputs.model_config))
    group, _, metric = (config.checkpoint.keep_best or "").partition("/")
    if group == "tasks" and metric not in tasks.larger_is_better:
        names = ", ".join(f"tasks/{name}" for name in tasks.larger_is_better)
        fault = f"checkpoint.keep_best: {group}/{metric}: eval.tasks gives no such metric; use one of {names}"
        raise ConfigError([fault], "the settings")
    return tasks


def _with_saved_commits(config: Config) -> DataConfig:
    """The data settings with the commits in the checkpoint of this run, so that a resume reads the same data.

    They come from where the run began, or from what it has saved since, here or only in its mirror.
    """
    train, mirror = config.train, config.checkpoint.mirror
    folder = RunFolder(Path(train.run_dir))
    saved = []
    for path in (*([] if train.resume in ("auto", "never") else [Path(train.resume)]), folder.path):
        with contextlib.suppress(CheckpointError):
            saved.append(newest_manifest(path))
    if mirror is not None and not list_checkpoints(folder.checkpoints):
        saved += Mirror(mirror, folder).newest()
    commits: dict[str, str] = {}
    for manifest in saved:
        commits |= manifest.config.get("data", {}).get("commits") or {}
    return config.data.model_copy(update={"commits": commits | config.data.commits})


def _check_tokenizer(config: Config, model_type: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns if the initial weights were trained with other tokens.

    Raises :class:`TokenizerError` if an export could not be loaded: in the folder of a Qwen2 model, transformers treats
    any tokenizer as one of Qwen's.
    """
    path = config.tokenizer_path
    if config.model.init_from is not None and config.model.new_tokens is None:
        theirs = own_tokenizer_path(Path(config.model.init_from))
        with contextlib.suppress(TokenizerError):  # the model may come without one
            if not gives_same_tokens(path, theirs, tokenizer):
                log.warning("%s gives other tokens than %s, which model.init_from was trained with", path, theirs)
    if model_type != "llama":
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
            Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
            save_tokenizer(tokenizer, folder)


def with_whole_text(inputs: Inputs, guard: Guard) -> Inputs:
    """Replaces rows that are packed whole by their tokens in the run folder, and ``train.epochs`` by its steps.

    A collective. The first rank reads the whole text, which may take hours, so it comes after every other check.
    """
    config = inputs.config
    guard.begin("tokenizing rows that are packed whole", within=READING_SECONDS)
    shards: list[Shard] = from_first_rank(
        lambda: tokens_of_whole_rows(inputs.shards, config.data, config.tokenizer_path, inputs.folder.tokens)
    )
    inputs = replace(inputs, shards=shards)
    epochs = config.train.epochs
    if epochs is None:
        return inputs
    guard.begin("counting the tokens of the training text", within=READING_SECONDS)
    counted = with_counted_epochs(config, from_first_rank(lambda: _count_tokens(config, inputs.shards, epochs)))
    setup = replace(inputs.setup, config=counted)
    return replace(inputs, setup=setup, epochs=epochs, warmup_fraction=config.optim.warmup_fraction)


def _count_tokens(config: Config, shards: Sequence[Shard], epochs: float) -> int:
    begin = time.perf_counter()
    log.info("train.epochs: counting the tokens of the training text")
    with Bar("counting the tokens of the training text", show=config.log.progress):
        tokens = count_epochs(config.data, config.tokenizer_path, lanes=config.lanes, epochs=epochs, shards=shards)
    log.info("%s epochs have %s tokens (%.1f s)", f"{epochs:g}", f"{tokens:,}", time.perf_counter() - begin)
    return tokens
