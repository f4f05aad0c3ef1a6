"""Checks that come before anything expensive: settings, model, memory, and whether all ranks agree."""

import contextlib
import json
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from relora_mora.adapters.stored import check_device, with_products
from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.checkpoint.reader import newest_manifest
from relora_mora.config.checks.combinations import unused_by
from relora_mora.config.data import DataConfig
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config, EvalConfig
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.data.content import fingerprints, local_content
from relora_mora.data.shard import Shard
from relora_mora.data.stream.producer import in_saved_order
from relora_mora.distributed.collectives import gather_from_ranks, same_on_all_ranks
from relora_mora.distributed.join import processes_on_host
from relora_mora.evaluation.harness import Tasks, TaskSettings
from relora_mora.model.compiling import compiles_here
from relora_mora.model.config import check_length, plain_model_config
from relora_mora.model.documents import check_attention
from relora_mora.model.guard import compared_by_tests, examine
from relora_mora.sizing.fit import check_adapters, check_memory
from relora_mora.sizing.setup import Setup
from relora_mora.system.hardware import fast_bf16, gpu_memory_bytes, host_memory_bytes, uses_cuda
from relora_mora.system.logs import log, shared_log
from relora_mora.system.run_folder import RunFolder
from relora_mora.tokenizer.files import TokenizerError
from relora_mora.tokenizer.identity import check_vocabulary, gives_same_tokens, save_tokenizer, tokenizer_fingerprint
from relora_mora.train.begin.identity import Identity, describe_differences
from relora_mora.train.begin.inputs import open_inputs
from relora_mora.train.begin.start_adapter import check_adapter, check_start
from relora_mora.weights.foreign import check_headers, positions_in
from relora_mora.weights.load import model_config_of, own_tokenizer_path


@dataclass
class ResolvedRun:
    """The settings of a run and what they refer to. The model and the tokenizer fit, and the data exists."""

    config: Config
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None  # that of the first conversations in the training data
    tokenizer_fingerprint: str
    shards: list[Shard]  # of the training data
    data_fingerprint: str
    data_content: str  # fingerprint of the shards' content; remote ones are added once the first rank has asked
    data_order: str
    bf16: bool
    compiled: bool  # the decoder layers
    passes_boundaries: bool  # whether each layer's attention gets the boundaries of documents
    tasks: Tasks | None = None  # of eval.tasks
    epochs: float | None = None  # train.epochs; once they are counted, the config has train.steps instead
    warmup_fraction: float | None = None  # optim.warmup_fraction, likewise

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


def with_saved_commits(config: Config) -> DataConfig:
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
        check_headers(Path(config.model.init_from))
    check_adapter(config, model_config)
    return model_config


def with_chosen_products(config: Config) -> Config:
    """Replaces ``method.base_products: auto`` by what is faster on this machine; the ranks compare it later."""
    if not config.method.uses_adapters:
        return config
    method, reason = with_products(
        config.method,
        bf16=_computes_in_bf16(config),
        capability=torch.cuda.get_device_capability() if uses_cuda() else None,
        vnni=torch.cpu._is_vnni_supported(),
    )
    if reason is not None:
        chosen = "multiplied in 8 bits" if method.base_products else "only stored in 8 bits, which is faster here"
        shared_log.info("method.base_products: weights under adapters are %s (%s)", chosen, reason)
    return config.model_copy(update={"method": method})


def _computes_in_bf16(config: Config) -> bool:
    return fast_bf16() if config.train.precision == "auto" else config.train.precision == "bf16"


def memory_of_rank() -> float:
    """Bytes of this rank's GPU, or its share of the host's memory."""
    return gpu_memory_bytes() if uses_cuda() else host_memory_of_rank()


def host_memory_of_rank() -> float:
    return host_memory_bytes() / processes_on_host()


def check(config: Config, world_size: int) -> ResolvedRun:
    """Reads and compares everything that is small; raises ValueErrors of the package that say what to do."""
    data = config.data
    model_config = check_model(config)
    passes_boundaries = True
    if not compared_by_tests(model_config):
        findings = examine(model_config, attention=config.model.attention, documents=data.masks_documents)
        kind = model_config.model_type
        log.info("model: the loss of a small %s differs from transformers' by %.1e", kind, findings.difference)
        passes_boundaries = findings.passes_boundaries
    compiled = compiles_here(config.model, config.train.zero_stage, on_gpu=uses_cuda())
    bf16 = _computes_in_bf16(config)
    on_gpu = uses_cuda()
    check_attention(config.model, bf16=bf16)
    check_device(config.method, bf16=bf16, on_gpu=on_gpu)
    setup = Setup(config, config.train.zero_stage, world_size, bf16=bf16, on_gpu=on_gpu, compiled=compiled)
    check_memory(model_config, setup, memory_of_rank(), host_memory_of_rank())
    inputs = open_inputs(config)
    tokenizer = inputs.tokenizer
    shards = inputs.shards
    remark = check_vocabulary(tokenizer, model_config.vocab_size, trained=config.model.init_from is not None)
    if remark:
        log.info(remark)
    tokens = tokenizer_fingerprint(config.tokenizer_path, tokenizer)
    _check_tokenizer(config, model_config.model_type, tokenizer)
    for name, who in unused_by(config).items():
        log.info("%s does not use %s", who, name)
    data_fingerprint, data_order = fingerprints(
        data, tokenizer_fingerprint=tokens, batch_lanes=config.lanes, shards=shards, tokenizer=tokenizer
    )
    return ResolvedRun(
        config=config,
        model_config=model_config,
        tokenizer=tokenizer,
        chat_template=inputs.chat_template,
        tokenizer_fingerprint=tokens,
        shards=shards,
        data_fingerprint=data_fingerprint,
        data_content=local_content(shards),
        data_order=data_order,
        bf16=bf16,
        compiled=compiled,
        passes_boundaries=passes_boundaries,
        tasks=_tasks(config, tokenizer, model_config),
    )


def task_settings(config: EvalConfig) -> TaskSettings:
    return TaskSettings(config.tasks, config.task_data, config.num_fewshot, config.limit, at="eval.")


def _tasks(config: Config, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> Tasks | None:
    """Raises HarnessError if the tasks cannot be scored, and ConfigError if they lack the metric of the best."""
    if not config.eval.tasks:
        return None
    tasks = Tasks(task_settings(config.eval), tokenizer, positions_in(model_config))
    group, _, metric = (config.checkpoint.keep_best or "").partition("/")
    if group == "tasks" and metric not in tasks.larger_is_better:
        names = ", ".join(f"tasks/{name}" for name in tasks.larger_is_better)
        fault = f"checkpoint.keep_best: {group}/{metric}: eval.tasks gives no such metric; use one of {names}"
        raise ConfigError([fault], "the settings")
    return tasks


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


APPEAR_SECONDS = 15.0  # for a file that another host has just written


def check_agreement(identity: Identity) -> None:
    """A collective. Raises :class:`ConfigError` on all ranks if one has other settings, or has read other files."""
    identities = gather_from_ranks((socket.gethostname(), identity))
    first_host, first = identities[0]
    faults = []
    for rank, (host, other) in enumerate(identities):
        different = describe_differences(first, other)
        if different:
            faults.append(
                f"rank {rank} ({host}): {', '.join(different)}: different from the first rank ({first_host}); "
                "start all ranks with the same command, and give all hosts the same files"
            )
    if faults:
        raise same_on_all_ranks(ConfigError(faults, "what the ranks found"))


def check_shared(file: Path, content: str) -> None:
    """A collective. Raises :class:`ConfigError` on all ranks if one does not see what the first rank wrote."""
    deadline = time.monotonic() + APPEAR_SECONDS
    while not (seen := _content(file) == content) and time.monotonic() < deadline:
        time.sleep(0.2)
    missing = [place for place in gather_from_ranks(None if seen else socket.gethostname()) if place is not None]
    if missing:
        hosts = ", ".join(dict.fromkeys(missing))
        fault = (
            f"train.run_dir: {file.parent} is another folder on {hosts}; put it on a file system that all hosts share"
        )
        raise same_on_all_ranks(ConfigError([fault], "what the ranks found"))


def _content(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None
