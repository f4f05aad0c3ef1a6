"""The checks of a start that need neither text nor its tokenizer: settings, run folder, model and machine."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from relora_mora.adapters.stored import with_products
from relora_mora.checkpoint.layout import list_checkpoints
from relora_mora.checkpoint.mirror import open_store
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config, EvalConfig, MethodConfig
from relora_mora.distributed.join import processes_on_host
from relora_mora.evaluation.harness import TaskSettings, check_tasks
from relora_mora.model.compiling import compiles_here
from relora_mora.model.config import check_length
from relora_mora.model.documents import check_attention
from relora_mora.optim.own import with_rule
from relora_mora.sizing.fit import check_adapters, check_memory
from relora_mora.sizing.setup import Setup
from relora_mora.system.hardware import fast_bf16, gpu_memory_bytes, host_memory_bytes, uses_cuda
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.start_adapter import check_adapter, check_start
from relora_mora.train.log.loggers import check_loggers
from relora_mora.weights.foreign import check_files
from relora_mora.weights.load import model_config_of
from relora_mora.weights.vocabulary import with_vocabulary


def check_settings(config: Config, world_size: int) -> tuple[Setup, PreTrainedConfig]:
    """Checks what needs neither text nor its tokenizer. Returns the settings with what follows from them."""
    check_loggers(config.log)
    if config.eval.tasks:
        check_tasks(task_settings(config.eval))
    if config.checkpoint.mirror is not None:
        open_store(config.checkpoint.mirror)
    check_run_folder(RunFolder(Path(config.train.run_dir)))
    config = with_vocabulary(with_rule(config))
    model_config = check_model(config)
    setup, reason = setup_here(config, world_size)
    if reason is not None:
        chosen = "multiplied" if setup.config.method.base_products else "only stored"
        log.info("method.base_products: weights under adapters are %s in 8 bits (%s)", chosen, reason)
    check_attention(config.model, bf16=setup.bf16)
    setup = replace(setup, compiled=compiles_here(config.model, setup.stage, on_gpu=setup.on_gpu))
    check_machine(model_config, setup)
    return setup, model_config


def check_run_folder(folder: RunFolder) -> None:
    """Raises :class:`ConfigError` if the run would overwrite files that are not of a run. First rank only.

    A trainer notes its start and its end, and one that was killed leaves its lock. A folder with checkpoints may have
    been copied from elsewhere.
    """
    if any(each.exists() for each in (folder.lock, folder.ends, folder.starts)) or list_checkpoints(folder.checkpoints):
        return
    outputs = (folder.config, folder.model_config, folder.tokenizer, folder.metrics, folder.wandb_id)
    existing = [output.name for output in outputs if output.exists()]
    if existing:
        fault = (
            f"train.run_dir: {folder.path} is not the folder of a run, and a run would overwrite {', '.join(existing)} "
            "there; give a new or empty folder"
        )
        raise ConfigError([fault], "the settings")


def check_model(config: Config) -> PreTrainedConfig:
    """The config of the model in the settings; raises ValueErrors of the package if the model cannot be built."""
    check_start(config)
    model_config = model_config_of(config.model)
    name = config.model.config or str(config.model.init_from)
    check_length(model_config, config.data.sequence_length, name, separate_documents=config.data.masks_documents)
    check_adapters(model_config, config.method)
    if config.model.init_from is not None:
        check_files(Path(config.model.init_from))
    check_adapter(config, model_config)
    return model_config


def task_settings(config: EvalConfig) -> TaskSettings:
    return TaskSettings(config.tasks, config.task_data, config.num_fewshot, config.limit, at="eval.")


def setup_here(config: Config, world_size: int) -> tuple[Setup, str | None]:
    """How this machine trains a run, and why it chose ``method.base_products`` (None: it did not choose)."""
    bf16 = fast_bf16() if config.train.precision == "auto" else config.train.precision == "bf16"
    setup = Setup(config, config.train.zero_stage, world_size, bf16=bf16, on_gpu=uses_cuda())
    method, reason = _with_products(setup)
    return replace(setup, config=config.model_copy(update={"method": method})), reason


def check_machine(model_config: PreTrainedConfig, setup: Setup) -> None:
    """Raises :class:`ConfigError` if this rank's device cannot compute as set, or has too little memory."""
    _with_products(setup)
    check_memory(model_config, setup, memory_of_rank(), host_memory_of_rank())


def memory_of_rank() -> float:
    """Bytes of this rank's GPU, or its share of the host's memory."""
    return gpu_memory_bytes() if uses_cuda() else host_memory_of_rank()


def host_memory_of_rank() -> float:
    return host_memory_bytes() / processes_on_host()


def _with_products(setup: Setup) -> tuple[MethodConfig, str | None]:
    """See :func:`with_products`, on this rank's device."""
    capability = torch.cuda.get_device_capability() if uses_cuda() else None
    vnni = torch.cpu._is_vnni_supported()
    return with_products(setup.config.method, bf16=setup.bf16, capability=capability, vnni=vnni)
