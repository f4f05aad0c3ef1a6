"""Singular values of a run's total update to its initial weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from relora_mora.adapters.layers import effective_rank
from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.config.load import stored_config
from relora_mora.model.causal import empty_model, initial_values, put_values
from relora_mora.optim.groups import group_of
from relora_mora.weights.digests import other_weights
from relora_mora.weights.export import checked_model, merged_weights
from relora_mora.weights.load import start_weights
from relora_mora.weights.peft import AdapterFolder

Spectra = dict[str, Tensor]  # [layers, n] by the kind of projection, descending; float32


@torch.no_grad()
def spectra_of(reader: CheckpointReader) -> Spectra:
    """The singular values of W - W_0 for every linear of the decoder; W includes merges and the current adapters.

    W_0 are the run's initial weights: drawn again from its seed, or read from its ``model.init_from``, with its
    ``model.adapter`` merged in. Raises :class:`CheckpointError` if the files of the initial weights are missing or have
    changed.
    """
    weights = merged_weights(reader)
    linears = [name for name, weight in weights.items() if group_of(name, weight.shape) == "linears"]
    spectra: dict[str, list[Tensor]] = {name.split(".")[-2]: [] for name in linears}
    initial = _initial_weights(reader, linears)
    for name, before in initial.items():
        if before is None or before.shape != weights[name].shape:
            raise CheckpointError(f"{reader.folder}: what it began with has changed, and has no {name} of this shape")
        spectra[name.split(".")[-2]].append(torch.linalg.svdvals(weights[name] - before))
    return {kind: torch.stack(layers) for kind, layers in spectra.items()}


def rank_columns(runs: Sequence[Spectra], above: float) -> dict[str, list[str]]:
    """Columns of a table: for each kind of projection, the effective rank and the number of singular values that are
    larger than ``above``, both as means over layers.
    """

    def means(values: Tensor) -> str:
        ranks = effective_rank(values).double().mean()
        return f"{float(ranks):.0f}; {float((values > above).sum(-1).double().mean()):.0f}"

    return {kind: [means(spectra[kind]) for spectra in runs] for kind in runs[0]}


def _initial_weights(reader: CheckpointReader, names: list[str]) -> Mapping[str, Tensor | None]:
    config = stored_config(reader.manifest.config, str(reader.folder))
    model = checked_model(reader)
    if config.model.init_from is None:
        seed = reader.manifest.counters["initial_seed"]
        return initial_values(empty_model(model.config), names, seed)
    source = Path(config.model.init_from)
    files = {"model.init_from": config.model.init_from, "model.adapter": config.model.adapter}
    for setting, path in files.items():
        if path is not None and not Path(path).exists():
            raise CheckpointError(f"{reader.folder}: began with {path} ({setting}), which no longer exists")
    if others := other_weights(reader.folder, config.model):
        changed = " and ".join(f"{words} ({files[setting]})" for setting, words in others.items())
        raise CheckpointError(f"{reader.folder}: began with {changed}")
    weights = start_weights(source)
    if config.model.adapter is not None:
        plain = empty_model(model.config)
        put_values(plain, weights)
        AdapterFolder(Path(config.model.adapter)).merge_into(plain, str(source))
        weights = plain.state_dict()
    return {name: weights.get(name) for name in names}
