"""The model that an adapter alone makes of its base."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from relora_mora.adapters.folder import AdapterFolder, is_adapter
from relora_mora.checkpoint import CheckpointError
from relora_mora.pretrained import LoadedModel, load_any_model
from relora_mora.tokenizer import has_tokenizer


def load_model(path: Path, dtype: torch.dtype, base: Path | None = None) -> LoadedModel:
    """The model of a checkpoint, run, Hugging Face folder or adapter alone, as :func:`load_any_model` gives it.

    ``base`` is the model that an adapter was trained on; by default its config names it. Raises
    :class:`CheckpointError` where that is not to be found, or does not fit.
    """
    if not is_adapter(path):
        if base is not None:
            raise CheckpointError(f"--base: {path} is no adapter alone, so it has none; leave it out")
        return load_any_model(path, dtype)
    adapter = AdapterFolder(path)
    under = load_any_model(base or _named_base(adapter), torch.float32)
    merge_into(under.model, adapter, str(base or adapter.base))
    for parameter in under.model.parameters():  # not the buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    if (path / GENERATION_CONFIG_NAME).is_file():  # it was trained to stop elsewhere than its base
        under.model.generation_config = GenerationConfig.from_pretrained(path)
    own: AbstractContextManager[Path] = nullcontext(path)
    return replace(
        under,
        tokenizer=own if has_tokenizer(path) else under.tokenizer,
        description=f"{path} on {under.description}",
        checkpoint=None,
    )


def _named_base(adapter: AdapterFolder) -> Path:
    if adapter.base is not None and Path(adapter.base).is_dir():
        return Path(adapter.base)
    named = "it names no model" if adapter.base is None else f"its model {adapter.base} is no folder here"
    raise CheckpointError(f"{adapter.folder}: an adapter alone, and {named}; give the model's folder with --base")


@torch.no_grad()
def merge_into(model: PreTrainedModel, adapter: AdapterFolder, named: str) -> None:
    """Adds every delta to its weight, in place, and sets what trained as a whole.

    ``model`` is in float32; errors call it ``named``.

    Raises :class:`CheckpointError` where the adapter is that of another model; the model is then half changed.
    """
    adapter.check_head(model)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    adapter.check_base(parameters.get, named)
    for name in adapter.layers:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{adapter.file}: {name} is no linear layer of {named}; give its own base")
        if not adapter.fits(name, linear.in_features, linear.out_features):
            raise CheckpointError(
                f"{adapter.file}: {name} has an M of {adapter.layers[name]}, and its rank makes another size of the "
                f"layer {linear.in_features} -> {linear.out_features} of {named}; give the model that the "
                "adapter was trained on"
            )
        with torch.device("meta"):
            layer = adapter.layer_on(name, linear)
        names = [f"{name}.{key}" for key in layer.adapter_names]
        for key in layer.adapter_names:
            _check_shape(adapter, f"{name}.{key}", layer.get_parameter(key), named)
        linear.weight += layer.delta_of(*map(adapter.value, names))
    for name in adapter.plain():
        _check_shape(adapter, name, parameters.get(name), named)
        parameters[name].copy_(adapter.value(name))


def _check_shape(adapter: AdapterFolder, name: str, expected: torch.Tensor | None, named: str) -> None:
    shape = None if expected is None else tuple(expected.shape)
    if adapter.shapes[name] != shape:
        wanted = "nothing of that name" if shape is None else list(shape)
        raise CheckpointError(
            f"{adapter.file}: {name} is {list(adapter.shapes[name])}, and {named} has {wanted}; "
            "give the model that the adapter was trained on"
        )
