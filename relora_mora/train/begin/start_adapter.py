"""Checks whether a run can begin with the weights and adapters that its settings name."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_parameters
from relora_mora.checkpoint.layout import MANIFEST, list_checkpoints
from relora_mora.config.load import ConfigError
from relora_mora.config.registry import LORA, MORA
from relora_mora.config.schema import Config, MethodConfig
from relora_mora.model.causal import empty_model
from relora_mora.optim.groups import set_trainable
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.weights.peft import AdapterFolder, is_adapter

_MODELS = ("config.json", MANIFEST, RunFolder(Path()).checkpoints.name)  # in a Hugging Face folder, a checkpoint, a run
_REMEDY = "give a Hugging Face folder of the LLaMA family (`hf download REPO --local-dir DIR` fetches one) or a run"


def check_start(config: Config) -> None:
    """Raises :class:`ConfigError` if ``model.init_from`` is not a model."""
    if config.model.init_from is None:
        return
    start = Path(config.model.init_from)
    fault = None
    if not start.exists():
        fault = f"does not exist; {_REMEDY}"
    elif is_adapter(start):
        fault = "holds an adapter without its model; give its model there, and the adapter in model.adapter"
    elif not any((start / name).exists() for name in _MODELS) and not list_checkpoints(start):
        fault = f"holds neither a config.json nor checkpoints; {_REMEDY}"
    if fault is not None:
        raise ConfigError([f"model.init_from: {start} {fault}"], "the settings")


def check_adapter(config: Config, model_config: PreTrainedConfig) -> None:
    """Raises :class:`ConfigError` with every difference between ``model.adapter`` and the adapters of the settings."""
    if config.model.adapter is None:
        return
    adapter = AdapterFolder(Path(config.model.adapter))
    faults = list(_method_faults(adapter, config.method))
    if not faults:
        lm = empty_model(model_config)
        adapter.check_head(lm)
        with torch.device("meta"):
            inject(lm, config.method, seed=config.train.seed)
        set_trainable(lm, config.method)
        faults = [*_alpha_faults(adapter, config.method), *_tensor_faults(adapter, lm)]
    if faults:
        raise ConfigError(faults, str(adapter.folder))
    start = str(config.model.init_from)
    if adapter.base is not None and Path(adapter.base).name != Path(start).name:
        log.warning(
            "model.adapter: %s was trained on %s, and model.init_from is %s", adapter.folder, adapter.base, start
        )


def _method_faults(adapter: AdapterFolder, method: MethodConfig) -> Iterator[str]:
    wanted = LORA if adapter.mora_type is None else MORA
    if method.record.adapter is not wanted:
        kind = "LoRA" if wanted is LORA else "MoRA"
        yield f"method.name: {method.name} in the settings, and the adapter is a {kind}; set method.name={kind.lower()}"
        return
    kinds = sorted({name.rpartition(".")[2] for name in adapter.layers})
    if method.target_modules is not None and kinds != sorted(method.target_modules):
        here = ", ".join(sorted(method.target_modules))
        yield (
            f"method.target_modules: {here} in the settings, and {', '.join(kinds)} in the adapter; "
            f"set method.target_modules=[{','.join(kinds)}]"
        )
    if adapter.mora_type is not None and adapter.mora_type != method.cycle[0]:
        yield (
            f"method.operators: begins with {method.cycle[0]}, and the adapter has operator {adapter.mora_type}; "
            f"begin with {adapter.mora_type}"
        )


def _alpha_faults(adapter: AdapterFolder, method: MethodConfig) -> Iterator[str]:
    there = set(adapter.alphas.values())
    differ = any(
        adapter.alphas[name] != float(rank if method.lora_alpha is None else method.lora_alpha)
        for name, rank in adapter.layers.items()
    )
    if adapter.mora_type is None and differ:
        alphas = ", ".join(f"{alpha:.17g}" for alpha in sorted(there))
        remedy = f"set method.lora_alpha={alphas}" if len(there) == 1 else "a run has one alpha for all layers"
        given = "r" if method.lora_alpha is None else f"{method.lora_alpha:.17g}"
        yield f"method.lora_alpha: {given} in the settings and {alphas} in the adapter; {remedy}"


def _tensor_faults(adapter: AdapterFolder, lm: PreTrainedModel) -> Iterator[str]:
    parameters = dict(lm.named_parameters())
    expected = {name: tuple(parameters[name].shape) for name in adapter_parameters(lm)}
    expected |= {name: tuple(parameters[name].shape) for name in adapter.plain() if name in parameters}
    wrong = sorted(name for name in expected | adapter.shapes if expected.get(name) != adapter.shapes.get(name))
    if wrong:
        name = wrong[0]
        there, here = adapter.shapes.get(name), expected.get(name)
        more = f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""
        yield (
            f"model.adapter: {name} is {list(there) if there else 'missing'} in {adapter.file} and "
            f"{list(here) if here else 'missing'} in this run{more}; {_remedy(adapter, name, here)}"
        )
    # a module with a trainable weight is saved as a whole, with biases that do not train
    whole = {name.rpartition(".")[0] for name, parameter in parameters.items() if parameter.requires_grad}
    frozen = sorted(name for name in adapter.plain() if name in parameters and name.rpartition(".")[0] not in whole)
    if frozen:
        yield (
            f"model.adapter: it contains {frozen[0]}, which does not train in this run; set "
            "method.train_linears, train_embeddings, train_norms or train_head as in the run that wrote it"
        )


def _remedy(adapter: AdapterFolder, name: str, here: tuple[int, ...] | None) -> str:
    """What to do about a tensor that has another shape in this run."""
    layer, _, matrix = name.rpartition(".")
    there = adapter.shapes.get(name)
    rank = adapter.layers.get(layer)
    ranks: dict[str, set[int]] = {}
    for each, of_layer in adapter.layers.items():
        ranks.setdefault(each.rpartition(".")[2], set()).add(of_layer)
    if there and here and rank is not None and all(len(of_kind) == 1 for of_kind in ranks.values()):
        if adapter.mora_type is not None:
            return (
                f"R is {rank} in the adapter: set method.rank, method.square_rounding (nearest: as the released MoRA) "
                "and method.square_multiple (1 if R is odd), or method.square_size; or give the model that it was "
                f"trained on in model.init_from ({adapter.base})"
            )
        if there == ((rank, here[1]) if matrix == "lora_A" else (here[0], rank)):
            pattern = ", ".join(f"{kind}: {each}" for kind, [each] in ranks.items())
            return f"set method.rank={rank}, or method.rank_pattern={{{pattern}}}"
    return (
        "if it is the adapter of another model, give that model in model.init_from; if it has not the same rank in all "
        "layers of a kind, merge it into its model, and begin with that"
    )
