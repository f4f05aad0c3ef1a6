"""Checkpoints as plain models, with the adapters merged in."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_layers, adapter_parameters
from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.config.load import stored_config
from relora_mora.model.config import stored_model_config
from relora_mora.model.llama import empty_model, put_values
from relora_mora.weights.foreign import abbreviate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checked_model(reader: CheckpointReader) -> PreTrainedModel:
    """The model of a checkpoint with its adapter layers and without values.

    Raises :class:`CheckpointError` if the checkpoint does not hold the tensors of that model.
    """
    manifest = reader.manifest
    config = stored_config(manifest.config, str(reader.folder))
    skeleton = _empty_model(reader)
    if config.method.uses_adapters:
        with torch.device("meta"):
            inject(skeleton, config.method, seed=config.train.seed, mora_type=manifest.operator, draw=manifest.draw)
    expected = {name: list(parameter.shape) for name, parameter in skeleton.named_parameters()}
    saved = manifest.parameters | manifest.frozen
    wrong = sorted(name for name in expected | saved if expected.get(name) != saved.get(name))
    if wrong:
        raise CheckpointError(
            f"{reader.folder}: does not hold the model it names: {wrong[0]} is {saved.get(wrong[0], 'missing')}, "
            f"expected {expected.get(wrong[0], 'nothing')}; use another checkpoint"
        )
    return skeleton


def merged_weights(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    """Every weight of the plain model in float32; ``W + delta`` for layers with an adapter.

    Raises :class:`CheckpointError` if the checkpoint does not hold the tensors of the model it names.
    """
    manifest = reader.manifest
    skeleton = checked_model(reader)
    adapters = dict(adapter_layers(skeleton))
    own = adapter_parameters(skeleton)
    weights = {name: reader.weight(name) for name in [*manifest.parameters, *manifest.frozen] if name not in own}
    for name, layer in adapters.items():
        weights[f"{name}.weight"] += layer.delta_of(*(reader.weight(f"{name}.{key}") for key in layer.adapter_names))
    return weights


def merged_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The plain model of a checkpoint folder that :func:`find_checkpoint` has verified.

    Raises :class:`CheckpointError` for weights that are too large for ``dtype``.
    """
    reader = CheckpointReader(path)
    model = _empty_model(reader)
    weights = {name: value.to(dtype) for name, value in merged_weights(reader).items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path}: weights too large for {kind} in {abbreviate(broken)}; choose another type, or an older checkpoint"
        )
    put_values(model, weights)
    model.config.dtype = dtype
    return model.eval()


def _empty_model(reader: CheckpointReader) -> PreTrainedModel:
    """The plain model of a checkpoint without values; raises :class:`CheckpointError` if its config is unusable."""
    try:
        return empty_model(stored_model_config(reader.manifest.model_config))
    except Exception as error:  # transformers raises nearly any kind
        message = " ".join(str(error).split())
        raise CheckpointError(
            f"{reader.folder}: transformers cannot build a model from its model_config: {message}; "
            "use another checkpoint"
        ) from error
