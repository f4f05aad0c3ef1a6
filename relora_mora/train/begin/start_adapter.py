"""Checks whether a run can begin with the weights and adapters that its settings name."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_parameters
from relora_mora.checkpoint.layout import MANIFEST, list_checkpoints
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config, MethodConfig
from relora_mora.model.causal import empty_model
from relora_mora.optim.groups import set_trainable
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.begin.files import START_REMEDY, check_start_exists
from relora_mora.weights.peft import AdapterFolder, is_adapter

_MODELS = ("config.json", MANIFEST, RunFolder(Path()).checkpoints.name)  # in a Hugging Face folder, a checkpoint, a run


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
