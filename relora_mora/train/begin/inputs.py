"""What a start finds out before anything is built: all checks of settings, model, text and hosts.

The first rank opens the inputs, and all ranks get the same record. What a host must have of its own each rank checks
itself, in :func:`agree`.
"""

import contextlib
import json
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from relora_mora.adapters.stored import check_device, with_products
from relora_mora.checkpoint.layout import CheckpointError, list_checkpoints
from relora_mora.checkpoint.mirror import open_store
from relora_mora.checkpoint.reader import newest_manifest
from relora_mora.config.data import DataConfig
from relora_mora.config.lengths import with_counted_epochs
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config, EvalConfig
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.data.content import content_of, fingerprints, with_versions
from relora_mora.data.first_rows import check_columns, check_lanes, check_records
from relora_mora.data.named_sets import with_commits
from relora_mora.data.read import count_epochs
from relora_mora.data.shard import Shard
from relora_mora.data.stream.producer import in_saved_order
from relora_mora.data.tokens.make import tokens_of_whole_rows
from relora_mora.distributed.collectives import from_first_rank, gather_from_ranks, on_all_ranks, same_on_all_ranks
from relora_mora.distributed.join import processes_on_host
from relora_mora.evaluation.harness import Tasks, TaskSettings, check_tasks
from relora_mora.model.compiling import compiles_here
from relora_mora.model.config import check_length, plain_model_config
from relora_mora.model.documents import check_attention
from relora_mora.model.guard import compared_by_tests, examine
from relora_mora.optim.own import with_rule
from relora_mora.sizing.fit import check_adapters, check_memory
from relora_mora.sizing.setup import Setup
from relora_mora.system.bars import Bar
from relora_mora.system.hardware import fast_bf16, gpu_memory_bytes, host_memory_bytes, uses_cuda
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.tokenizer.files import TokenizerError, check_exists
from relora_mora.tokenizer.identity import check_vocabulary, gives_same_tokens, save_tokenizer, tokenizer_fingerprint
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.train.begin.identity import Identity, changed_settings
from relora_mora.train.begin.start_adapter import check_adapter, check_start
from relora_mora.train.begin.text import open_text
from relora_mora.train.log.loggers import check_loggers
from relora_mora.weights.foreign import check_files, positions_in
from relora_mora.weights.load import model_config_of, own_tokenizer_path
from relora_mora.weights.vocabulary import with_vocabulary


@dataclass(frozen=True)
class Inputs:
    """The settings of a run and what they refer to. The model and the tokenizer fit, and the data exists."""

    config: Config
    world_size: int
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase  # with the chat template of the first conversations in the training data
    tokenizer_fingerprint: str
    shards: list[Shard]  # of the training data
    data_fingerprint: str
    data_content: str  # fingerprint of the shards' content
    data_order: str
    bf16: bool
    compiled: bool  # the decoder layers
    passes_boundaries: bool  # whether each layer's attention gets the boundaries of documents
    # agreed by the ranks
    memory: float = 0.0  # bytes of the rank that has least
    tasks: Tasks | None = None  # of eval.tasks, loaded on each host
    # found in the run folder, once this run has its lock
    epochs: float | None = None  # train.epochs; once they are counted, the config has train.steps instead
    warmup_fraction: float | None = None  # optim.warmup_fraction, likewise
    checkpoint: Path | None = None  # where the run continues or begins; None: at step 0

    @property
    def identity(self) -> Identity:
        return Identity(
            config=self.config.model_dump(mode="json"),
            model_config=plain_model_config(self.model_config),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            eos_token_id=self.tokenizer.eos_token_id,
            data_fingerprint=self.data_fingerprint,
            data_content=self.data_content,
            data_order=self.data_order,
            bf16=self.bf16,
        )

    @property
    def setup(self) -> Setup:
        stage = self.config.train.zero_stage
        return Setup(self.config, stage, self.world_size, bf16=self.bf16, on_gpu=uses_cuda(), compiled=self.compiled)


def open_inputs(config: Config, world_size: int) -> Inputs:
    """Reads and compares everything that is small; raises ValueErrors of the package that say what to do.

    Only one rank calls it. What is wrong on this machine is found before a server is asked for anything, which may take
    minutes.
    """
    if config.tokenizer.path is not None:
        try:
            check_exists(Path(config.tokenizer.path))
        except TokenizerError as error:
            raise TokenizerError(f"tokenizer.path: {error}") from error
    config, model_config, setup = check_settings(config, world_size)
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
    data_fingerprint, data_order = fingerprints(
        data, tokenizer_fingerprint=tokens, batch_lanes=config.lanes, shards=shards, tokenizer=tokenizer
    )
    if text.chat_template is not None:  # the saved tokenizer, also of an export, writes what the run trains on
        tokenizer.chat_template = text.chat_template
    return Inputs(
        config=config,
        world_size=world_size,
        model_config=model_config,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokens,
        shards=shards,
        data_fingerprint=data_fingerprint,
        data_content=_content(shards),
        data_order=data_order,
        bf16=setup.bf16,
        compiled=setup.compiles,
        passes_boundaries=passes_boundaries,
    )


def check_settings(config: Config, world_size: int) -> tuple[Config, PreTrainedConfig, Setup]:
    """Checks what needs neither text nor its tokenizer. Returns the settings with what follows from them."""
    check_loggers(config.log)
    if config.eval.tasks:
        check_tasks(task_settings(config.eval))
    if config.checkpoint.mirror is not None:
        open_store(config.checkpoint.mirror)
    check_run_folder(Path(config.train.run_dir))
    config = with_vocabulary(with_rule(config))
    model_config = check_model(config)
    bf16 = _computes_in_bf16(config)
    config, reason = _with_chosen_products(config, bf16=bf16)
    if reason is not None:
        chosen = (
            "multiplied in 8 bits" if config.method.base_products else "only stored in 8 bits, which is faster here"
        )
        log.info("method.base_products: weights under adapters are %s (%s)", chosen, reason)
    check_attention(config.model, bf16=bf16)
    stage = config.train.zero_stage
    compiled = compiles_here(config.model, stage, on_gpu=uses_cuda())
    setup = Setup(config, stage, world_size, bf16=bf16, on_gpu=uses_cuda(), compiled=compiled)
    _check_machine(model_config, setup)
    return config, model_config, setup


def check_run_folder(path: Path) -> None:
    """Raises :class:`ConfigError` if the run would overwrite files that are not of a run. First rank only.

    A trainer notes its start and its end, and one that was killed leaves its lock. A folder with checkpoints may have
    been copied from elsewhere.
    """
    folder = RunFolder(path)
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            fault = (
                f"train.run_dir: {place} is a link to a folder that does not exist; mount its disk, or remove the link"
            )
            raise ConfigError([fault], "the settings")
    if any(each.exists() for each in (folder.lock, folder.ends, folder.starts)) or list_checkpoints(folder.checkpoints):
        return
    outputs = (folder.config, folder.model_config, folder.tokenizer, folder.metrics, folder.wandb_id)
    existing = [output.name for output in outputs if output.exists()]
    if existing:
        fault = (
            f"train.run_dir: {path} is not the folder of a run, and a run would overwrite {', '.join(existing)} there; "
            "give a new or empty folder"
        )
        raise ConfigError([fault], "the settings")


def check_model(config: Config) -> PreTrainedConfig:
    """The config of the model in the settings; raises ValueErrors of the package if the model cannot be built."""
    check_start(config)
    model_config = model_config_of(config.model)
    check_length(
        model_config,
        config.data.sequence_length,
        config.model.config or str(config.model.init_from),
        separate_documents=config.data.masks_documents,
    )
    check_adapters(model_config, config.method)
    if config.model.init_from is not None:
        check_files(Path(config.model.init_from))
    check_adapter(config, model_config)
    return model_config


def task_settings(config: EvalConfig) -> TaskSettings:
    return TaskSettings(config.tasks, config.task_data, config.num_fewshot, config.limit, at="eval.")


# ---- agreed by the ranks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Host:
    """What a rank finds on its own host. It must be the same on all, except for the memory."""

    settings: dict[str, Any]  # as they were given, with the digest of a rule of one's own and the products chosen here
    tokenizer: tuple[str, Any]  # its fingerprint, and the token that ends a document
    content: str  # of the training text
    bf16: bool
    memory: float


def agree(inputs: Inputs, given: Config, rank: int) -> Inputs:
    """Checks what each host must have of its own, and that it is the same on all; a collective.

    ``given`` are the settings that this ``rank`` was started with. Raises :class:`ConfigError` on all ranks if one has
    other settings, or finds other files.
    """
    tasks, own = on_all_ranks(lambda: (_tasks(inputs), _found_here(inputs, given, rank)))
    (first_host, first), *others = gather_from_ranks((socket.gethostname(), own))
    faults = []
    for number, (host, other) in enumerate(others, 1):
        names = [*changed_settings(first.settings, other.settings)]
        names += ["the tokenizer"] * (first.tokenizer != other.tokenizer)
        names += ["the training data"] * (first.content != other.content)
        names += ["the fast precision of the device"] * (first.bf16 != other.bf16)
        if names:
            faults.append(
                f"rank {number} ({host}): {', '.join(names)}: different from the first rank ({first_host}); "
                "start all ranks with the same command, and give all hosts the same files"
            )
    if faults:
        raise same_on_all_ranks(ConfigError(faults, "what the ranks found"))
    return replace(inputs, tasks=tasks, memory=min(host.memory for _, host in [(first_host, first), *others]))


def _found_here(inputs: Inputs, given: Config, rank: int) -> _Host:
    tokens = inputs.tokenizer_fingerprint
    eos = inputs.tokenizer.eos_token_id
    content = inputs.data_content
    bf16 = _computes_in_bf16(given)
    if rank > 0:
        _check_machine(inputs.model_config, inputs.setup)
        path = given.tokenizer.path or inputs.config.tokenizer_path
        tokenizer = load_tokenizer(path)
        tokens, eos = tokenizer_fingerprint(path, tokenizer), tokenizer.eos_token_id
        content = _content(inputs.shards)
    settings, _ = _with_chosen_products(with_rule(given), bf16=bf16)
    return _Host(
        settings=settings.model_dump(mode="json"),
        tokenizer=(tokens, eos),
        content=content,
        bf16=bf16,
        memory=memory_of_rank(),
    )


def _content(shards: Sequence[Shard]) -> str:
    """Fingerprints of the content of local and of other shards."""
    return "".join(content_of([shard for shard in shards if shard.is_remote is remote]) for remote in (False, True))


def _check_machine(model_config: PreTrainedConfig, setup: Setup) -> None:
    capability = torch.cuda.get_device_capability() if setup.on_gpu else None
    check_device(setup.config.method, bf16=setup.bf16, capability=capability)
    check_memory(model_config, setup, memory_of_rank(), host_memory_of_rank())


def memory_of_rank() -> float:
    """Bytes of this rank's GPU, or its share of the host's memory."""
    return gpu_memory_bytes() if uses_cuda() else host_memory_of_rank()


def host_memory_of_rank() -> float:
    return host_memory_bytes() / processes_on_host()


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


# ---- of the first rank -----------------------------------------------------------------------------------------------


def _computes_in_bf16(config: Config) -> bool:
    return fast_bf16() if config.train.precision == "auto" else config.train.precision == "bf16"


def _with_chosen_products(config: Config, *, bf16: bool) -> tuple[Config, str | None]:
    """Replaces ``method.base_products: auto`` by what is faster here; returns the reason of a choice, too."""
    if not config.method.uses_adapters:
        return config, None
    method, reason = with_products(
        config.method,
        bf16=bf16,
        capability=torch.cuda.get_device_capability() if uses_cuda() else None,
        vnni=torch.cpu._is_vnni_supported(),
    )
    return config.model_copy(update={"method": method}), reason


def _with_saved_commits(config: Config) -> DataConfig:
    """The data settings with the commits that this run has read before, so that a resume reads the same data.

    The commits are in the checkpoint that the run resumes from and in the settings of its previous start. The sources
    of a mixture keep the order that they have in the checkpoint.
    """
    run_dir = Path(config.train.run_dir)
    named = config.train.resume not in ("auto", "never")
    saved: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        saved = newest_manifest(Path(config.train.resume) if named else run_dir).config.get("data", {})
    known: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError, ValueError, yaml.YAMLError, TypeError, KeyError):
        known = dict(parse_yaml(RunFolder(run_dir).config.read_text(encoding="utf-8"))["data"]["commits"])
    known |= (saved.get("commits") or {}) | config.data.commits
    return in_saved_order(config.data.model_copy(update={"commits": known}), saved)


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
    if model_type == "llama":
        return
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        save_tokenizer(tokenizer, folder)


def with_tokens(inputs: Inputs) -> Inputs:
    """Replaces text and records that are packed whole by their tokens in the run folder; a collective."""
    config = inputs.config
    cache = RunFolder(Path(config.train.run_dir)).tokens
    made: dict[int, Shard] = from_first_rank(
        lambda: tokens_of_whole_rows(inputs.shards, config.data, config.tokenizer_path, cache)
    )
    return replace(inputs, shards=[made.get(number, shard) for number, shard in enumerate(inputs.shards)])


def count_tokens(inputs: Inputs) -> int:
    """Counts the tokens of ``train.epochs``. One rank reads the whole text."""
    begin = time.perf_counter()
    config = inputs.config
    epochs = config.train.epochs or 1.0
    log.info("train.epochs: counting the tokens of the training text")
    with Bar("counting the tokens of the training text", show=config.log.progress):
        tokens = count_epochs(
            config.data, config.tokenizer_path, lanes=config.lanes, epochs=epochs, shards=inputs.shards
        )
    log.info("%s epochs have %s tokens (%.1f s)", f"{epochs:g}", f"{tokens:,}", time.perf_counter() - begin)
    return tokens


def with_epochs(inputs: Inputs, tokens: int) -> Inputs:
    """Sets the steps of ``train.epochs``, which have so many tokens, and ``optim.warmup_fraction``."""
    config = inputs.config
    return replace(
        inputs,
        config=with_counted_epochs(config, tokens),
        epochs=config.train.epochs,
        warmup_fraction=config.optim.warmup_fraction,
    )
