"""Checkpoints as plain models with the adapters merged in, and their export.

A checkpoint is exported as a plain model or as an adapter without its base; neither needs this package.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers, adapter_parameters
from relora_mora.checkpoint.layout import TOKENIZER, CheckpointError
from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint
from relora_mora.config.load import stored_config
from relora_mora.config.schema import Config, MethodConfig
from relora_mora.model.causal import empty_model, ends_of, put_values
from relora_mora.model.config import stored_model_config
from relora_mora.optim.groups import IN_LAYER
from relora_mora.system.files import new_folder
from relora_mora.system.logs import counted, log
from relora_mora.system.run_folder import RunFolder
from relora_mora.tokenizer.identity import save_tokenizer
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.weights.digests import other_weights
from relora_mora.weights.foreign import abbreviate
from relora_mora.weights.generation import generation_config, ids_of_roles
from relora_mora.weights.peft import CONFIG, KEY, PREFIX, RELEASED_TYPES, WEIGHTS, base_sample
from relora_mora.weights.push import CARD, model_card


def checked_model(reader: CheckpointReader) -> PreTrainedModel:
    """The model of a checkpoint with its adapter layers and without values.

    Raises :class:`CheckpointError` if the checkpoint does not hold the tensors of that model.
    """
    manifest = reader.manifest
    config = stored_config(manifest.config, str(reader.folder))
    skeleton = model_without_values(reader)
    if config.method.uses_adapters:
        with torch.device("meta"):
            inject(skeleton, config.method, seed=config.train.seed, mora_type=manifest.operator)
    expected = {name: list(parameter.shape) for name, parameter in skeleton.named_parameters()}
    saved = manifest.parameters | manifest.frozen
    wrong = sorted(name for name in expected | saved if expected.get(name) != saved.get(name))
    if wrong:
        raise CheckpointError(
            f"{reader.folder}: does not hold the model it names: {wrong[0]} is {saved.get(wrong[0], 'missing')}, "
            f"expected {expected.get(wrong[0], 'nothing')}; use another checkpoint"
        )
    return skeleton


def merged_weights(reader: CheckpointReader) -> dict[str, Tensor]:
    """Every weight of the plain model in float32; ``W + delta`` for layers with an adapter.

    Raises :class:`CheckpointError` if the checkpoint does not hold the tensors of the model it names.
    """
    skeleton = checked_model(reader)
    own = adapter_parameters(skeleton)
    names = [*reader.manifest.parameters, *reader.manifest.frozen]
    weights = {name: reader.weight(name) for name in names if name not in own}
    for name, layer in adapter_layers(skeleton):
        weights[f"{name}.weight"] += layer.delta_of(*(reader.weight(f"{name}.{key}") for key in layer.adapter_names))
    return weights


def merged_model(reader: CheckpointReader, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The plain model of a checkpoint that :func:`find_checkpoint` has verified.

    Raises :class:`CheckpointError` for weights that are too large for ``dtype``.
    """
    model = model_without_values(reader)
    put_values(model, _cast(merged_weights(reader), dtype, reader.folder))
    model.config.dtype = dtype
    return model.eval()


def model_without_values(reader: CheckpointReader) -> PreTrainedModel:
    """The plain model of a checkpoint without values; raises :class:`CheckpointError` if its config is unusable."""
    try:
        return empty_model(stored_model_config(reader.manifest.model_config))
    except Exception as error:  # transformers raises nearly any kind
        message = " ".join(str(error).split())
        raise CheckpointError(
            f"{reader.folder}: transformers cannot build a model from its model_config: {message}; "
            "use another checkpoint"
        ) from error


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    cast = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    broken = [name for name, value in cast.items() if not value.isfinite().all()]
    if broken:
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{folder}: numbers too large for {kind} in {abbreviate(broken)}; choose another type")
    return cast


def write_adapter(reader: CheckpointReader, out: Path, dtype: torch.dtype, *, released: bool) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` of a checkpoint into an existing folder.

    LoRA is written as it is. MoRA is written as the LoRA with the same delta, of rank R (operator 6: R for each block
    of inputs), or with ``released`` in the format of the released MoRA. Other trained parameters are added as whole
    modules.

    Raises :class:`CheckpointError` if there is no adapter, or if ``model.init_from`` plus the adapter is not the run's
    model.
    """
    lm = checked_model(reader)
    config = stored_config(reader.manifest.config, str(reader.folder))
    _check_exportable(reader, config, lm, released=released)
    layers = dict(adapter_layers(lm))
    modules = {name.rpartition(".")[0] for name in set(reader.manifest.parameters) - adapter_parameters(lm)}
    names = [*reader.manifest.parameters, *reader.manifest.frozen]
    tensors = {f"{PREFIX}{name}": reader.weight(name) for name in names if name.rpartition(".")[0] in modules}
    ranks: dict[str, float] = {}  # by kind of projection, since the layers of a kind have the same shape
    for name, layer in layers.items():
        values = [reader.weight(f"{name}.{key}") for key in layer.adapter_names]
        A, B = (values[0], values[0].clone()) if released else layer.as_lora(*values)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
        # the released code computes R as the square root of (in + out) r
        rank = len(A) ** 2 / (layer.in_features + layer.out_features) if released else len(A)
        ranks[name.rpartition(".")[2]] = rank
    base = f"{next(iter(layers))}.weight"
    metadata = {"format": "pt", KEY: base_sample(base, reader.weight(base))}
    save_file(_cast(tensors, dtype, reader.folder), out / WEIGHTS, metadata=metadata)
    settings = {
        "base_model_name_or_path": config.model.init_from,
        **_settings(config.method, ranks, released=released),
        # one name for the same module of all layers
        "modules_to_save": sorted({m.rpartition(".")[2] if IN_LAYER.search(m) else m for m in modules}) or None,
    }
    if released:
        settings |= {"use_mora": True, "mora_type": reader.manifest.operator}
    (out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _check_exportable(reader: CheckpointReader, config: Config, lm: PreTrainedModel, *, released: bool) -> None:
    manifest, method = reader.manifest, config.method
    began = other_weights(reader.folder, config.model).get("model.init_from")
    tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    biases = {name for name, _ in adapter_layers(lm) if f"{name}.bias" in manifest.parameters}
    faults = [
        (not method.uses_adapters, f"{method.name} trains without adapters"),
        (
            config.model.init_from is None or began == "no model.init_from",
            "it began with no model.init_from, so there is no base model for its adapter",
        ),
        (manifest.merges_done, f"{counted(manifest.merges_done, 'merge')} changed the base weights of its adapter"),
        (config.model.new_tokens, "it added rows for new tokens, so its model is not model.init_from plus an adapter"),
        (
            tied and ends_of(lm)[0] in manifest.parameters,
            "it trained embeddings that are also the head, which PEFT does not store with an adapter",
        ),
        (biases, f"biases of layers with adapters were trained ({abbreviate(biases)}), which an adapter does not hold"),
        (
            released and manifest.operator not in RELEASED_TYPES,
            f"{method.name} with operator {manifest.operator} is not known to the released MoRA",
        ),
    ]
    fault = next((text for is_so, text in faults if is_so), None)
    if fault is not None:
        raise CheckpointError(f"{reader.folder}: {fault}; export it with --format=merged")
    if began is not None:
        log.warning(
            "%s: %s, the base that the adapter names, has other files than the run began with; use the original ones",
            reader.folder,
            config.model.init_from,
        )


def _settings(method: MethodConfig, ranks: Mapping[str, float], *, released: bool) -> dict[str, Any]:
    alpha: float = method.rank if method.lora_alpha is None or method.uses_squares else method.lora_alpha
    patterns = ranks if method.uses_squares else method.rank_pattern
    fixed = released if method.uses_squares else method.lora_alpha is not None  # one alpha for all
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": method.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": patterns,
        "alpha_pattern": {} if fixed else patterns,
        "lora_dropout": method.dropout,
        "target_modules": sorted(ranks) if method.target_modules is None else sorted(method.target_modules),
        "bias": "none",
    }


def export(
    path: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    form: str = "merged",
    *,
    shard_gb: float = 5,
    title: str | None = None,
    before_merge: Callable[[], object] = lambda: None,
) -> Path:
    """Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; returns the checkpoint it used.

    ``form`` is ``merged`` for the whole model, or ``peft`` or ``peft-mora`` for only its adapter
    (:func:`write_adapter`). Special tokens and their ids come from the tokenizer, other settings of ``generate`` from
    the base. The model card is called ``title``, or like the folder. ``before_merge`` is called when the checkpoint is
    known to be whole, before anything expensive. No file of the checkpoint is copied; model and tokenizer are written
    again, weights in files of up to ``shard_gb``. The folder appears complete or not at all. Raises
    :class:`CheckpointError` if ``path`` is not a checkpoint or its adapter cannot be exported, and FileExistsError if
    the output folder is not empty.
    """
    with new_folder(out) as work:
        checkpoint = find_checkpoint(path)
        tokenizer = load_tokenizer(checkpoint / TOKENIZER)
        reader = CheckpointReader(checkpoint)
        run = RunFolder.of(checkpoint)
        generation = generation_config(tokenizer, model_without_values(reader).config, run)
        before_merge()
        if form == "merged":
            model = merged_model(reader, dtype)
            model.config.update({**ids_of_roles(tokenizer), "use_cache": True})
            model.save_pretrained(work, max_shard_size=int(shard_gb * 1e9))
            _name_rope(work / "config.json")
        else:
            write_adapter(reader, work, dtype, released=form == "peft-mora")
        # transformers would refuse to save settings that it only warns about, such as a temperature without sampling
        generation.to_json_file(work / GENERATION_CONFIG_NAME)
        save_tokenizer(tokenizer, work)
        library = "transformers" if form == "merged" else "peft"
        card = model_card(reader.manifest, run, title or out.absolute().name, library)
        (work / CARD).write_text(card, encoding="utf-8")
    return checkpoint


def _name_rope(path: Path) -> None:
    """Adds the keys of transformers 4 next to ``rope_parameters`` of transformers 5.

    Without them, transformers 4 and programs based on it would use a base of 10,000 and no scaling.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    parameters = config.get("rope_parameters") or {}
    if "rope_theta" in parameters:
        config["rope_theta"] = parameters["rope_theta"]
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        if scaling.get("rope_type") == "longrope":  # transformers 4 reads the length only here
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
