"""The checks of a start that need neither text nor its tokenizer: settings, run folder, model and machine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_parameters
from relora_mora.adapters.stored import with_products
from relora_mora.checkpoint.layout import MANIFEST, list_checkpoints
from relora_mora.checkpoint.mirror import open_store
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config, EvalConfig, MethodConfig
from relora_mora.distributed.join import processes_on_host
from relora_mora.evaluation.harness import TaskSettings, check_tasks
from relora_mora.model.causal import empty_model
from relora_mora.model.compiling import compiles_here
from relora_mora.model.config import check_length
from relora_mora.model.documents import check_attention
from relora_mora.optim.groups import set_trainable
from relora_mora.optim.own import with_rule
from relora_mora.sizing.fit import check_adapters, check_memory
from relora_mora.sizing.setup import Setup
from relora_mora.system.hardware import fast_bf16, gpu_memory_bytes, host_memory_bytes, uses_cuda
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.files import START_REMEDY, check_start_exists
from relora_mora.train.log.loggers import check_loggers
from relora_mora.weights.foreign import check_files
from relora_mora.weights.load import model_config_of
from relora_mora.weights.peft import AdapterFolder, is_adapter
from relora_mora.weights.vocabulary import with_vocabulary

_MODELS = ("config.json", MANIFEST, RunFolder(Path()).checkpoints.name)  # in a Hugging Face folder, a checkpoint, a run


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


def check_start(config: Config) -> None:
    """Raises :class:`ConfigError` if ``model.init_from`` is not a model."""
    if config.model.init_from is None:
        return
    start = Path(config.model.init_from)
    check_start_exists(start)
    fault = None
    if is_adapter(start):
        fault = "holds an adapter without its model; give its model there, and the adapter in model.adapter"
    elif not any((start / name).exists() for name in _MODELS) and not list_checkpoints(start):
        fault = f"holds neither a config.json nor checkpoints; {START_REMEDY}"
    if fault is not None:
        raise ConfigError([f"model.init_from: {start} {fault}"], "the settings")


def check_adapter(config: Config, model_config: PreTrainedConfig) -> None:
    """Raises :class:`ConfigError` with every difference between ``model.adapter`` and the adapters of the settings."""
    if config.model.adapter is None:
        return
    adapter = AdapterFolder(Path(config.model.adapter))
    lm = empty_model(model_config)
    adapter.check_head(lm)
    with torch.device("meta"):
        inject(lm, config.method, seed=config.train.seed)
    set_trainable(lm, config.method)
    faults = list(_faults(adapter, config.method, lm))
    if faults:
        raise ConfigError(faults, str(adapter.folder))
    start = str(config.model.init_from)
    if adapter.base is not None and Path(adapter.base).name != Path(start).name:
        log.warning(
            "model.adapter: %s was trained on %s, and model.init_from is %s", adapter.folder, adapter.base, start
        )


def _faults(adapter: AdapterFolder, method: MethodConfig, lm: PreTrainedModel) -> Iterator[str]:
    parameters = dict(lm.named_parameters())
    plain = [name for name in adapter.plain() if name in parameters]
    expected = {name: tuple(parameters[name].shape) for name in (*adapter_parameters(lm), *plain)}
    wrong = sorted(name for name in expected | adapter.shapes if expected.get(name) != adapter.shapes.get(name))
    if wrong:
        there, here = (shapes.get(wrong[0], "missing") for shapes in (adapter.shapes, expected))
        yield (
            f"model.adapter: {wrong[0]} is {there} in {adapter.file} and {here} in this run ({len(wrong)} tensors "
            f"differ); {_description(adapter)}: set method.name, rank (or rank_pattern, square_size), target_modules "
            f"and what else trains as in that run, and model.init_from to its model ({adapter.base})"
        )
    # a module with a trainable weight is saved as a whole, with biases that do not train
    whole = {name.rpartition(".")[0] for name, parameter in parameters.items() if parameter.requires_grad}
    if frozen := [name for name in plain if name.rpartition(".")[0] not in whole]:
        yield (
            f"model.adapter: it contains {frozen[0]}, which does not train in this run; set "
            "method.train_linears, train_embeddings, train_norms or train_head as in the run that wrote it"
        )
    if adapter.mora_type is not None and method.cycle[:1] not in ((), (adapter.mora_type,)):
        yield f"method.operators: begins with {method.cycle[0]}, and the adapter has operator {adapter.mora_type}"
    given = method.lora_alpha
    differ = any(adapter.alphas[name] != (rank if given is None else given) for name, rank in adapter.layers.items())
    if adapter.mora_type is None and differ:
        alphas = ", ".join(f"{alpha:.17g}" for alpha in sorted(set(adapter.alphas.values())))
        yield f"method.lora_alpha: {given or 'r'} in the settings and {alphas} in the adapter; a run has one value"


def _description(adapter: AdapterFolder) -> str:
    """Which adapter a folder holds, such as ``it is LoRA with {q_proj: 4, v_proj: 8}``."""
    kinds: dict[str, set[int]] = {}
    for name, rank in adapter.layers.items():
        kinds.setdefault(name.rpartition(".")[2], set()).add(rank)
    sizes = ", ".join(f"{kind}: {' or '.join(map(str, sorted(ranks)))}" for kind, ranks in sorted(kinds.items()))
    return f"it is {'LoRA with ranks' if adapter.mora_type is None else 'MoRA with R of'} {{{sizes}}}"
