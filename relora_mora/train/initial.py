"""The values that a run's parameters begin with: each made by one rank, and put where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from relora_mora.adapters import AdapterFolder
from relora_mora.config import Config, ConfigError
from relora_mora.distributed.collectives import from_first_rank
from relora_mora.merging import FrozenMasters
from relora_mora.model import function_differences
from relora_mora.model.llama import initial_value
from relora_mora.pretrained import in_short, start_config, start_weights
from relora_mora.zero import ZeroEngine


def initial_values(
    lm: PreTrainedModel, base: FrozenMasters, config: Config, world_size: int
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Which rank makes which parameter of the plain model, and what this rank has made, in float32.

    A collective. The ranks draw at the same time, a part each; ``model.init_from`` and ``model.adapter``, whose values
    take the place of those that the adapters were drawn with, are read by the first rank.
    """
    shapes = {name: p.shape for name, p in lm.named_parameters() if p.is_meta}
    made: dict[str, Tensor] = {}
    if config.model.init_from is not None:

        def read() -> list[str]:
            made.update(_foreign_weights(config, lm, shapes))
            if config.model.adapter is not None:
                adapter = AdapterFolder(Path(config.model.adapter))
                adapter.check_base(made.get, config.model.init_from or "model.init_from")
                made.update((name, adapter.value(name)) for name in adapter.shapes)
            return list(made)

        return dict.fromkeys(from_first_rank(read), 0), made
    maker = dict(base.owner)
    load = [0] * world_size
    frozen_first = sorted(shapes.items(), key=lambda item: item[0] not in base.owner)
    for name, shape in frozen_first:  # what trains goes to the rank that has least to do
        load[maker.setdefault(name, load.index(min(load)))] += shape.numel()
    return maker, {name: initial_value(lm, name, config.train.seed) for name in shapes if maker[name] == base.rank}


def write_initial_values(
    engine: ZeroEngine, base: FrozenMasters, maker: Mapping[str, int], made: dict[str, Tensor]
) -> None:
    """Puts initial values where they belong, one parameter after the other; a collective.

    What is frozen goes to the base of its owner, and from there to all in the precision that they compute with; of what
    trains each rank takes the part of the float32 master that it owns.
    """
    for name, rank in maker.items():
        owner = base.owner.get(name)
        value = made.pop(name, None)
        if engine.world_size > 1 and owner != rank:
            sent = torch.empty(engine.shapes[name], dtype=torch.float32, device=engine.device)
            if value is not None:
                sent.copy_(value)
            engine.broadcast(sent, rank)
            value = sent
        if owner is None:
            assert value is not None
            engine.scatter(name, value)
        elif owner == engine.rank:
            assert value is not None
            base.put(name, value)
    base.push(engine)
    engine.refresh()


def _foreign_weights(config: Config, lm: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The float32 weights of ``model.init_from`` by the names of ours.

    Raises :class:`ConfigError` where they do not fit, or mean something else in the model that they come from.
    """
    path = Path(str(config.model.init_from))
    _check_function(start_config(path), lm.config, path)
    weights = start_weights(path, lm.config)
    embedding = weights["model.embed_tokens.weight"]
    if lm.config.tie_word_embeddings and not torch.equal(embedding, weights.get("lm_head.weight", embedding)):
        fault = (
            "model.init_from: its config ties the output head to the embeddings, but its files hold another head; "
            "set tie_word_embeddings to false in its config.json and in model.overrides"
        )
        raise ConfigError([fault], str(path))
    broken = [name for name in shapes if not weights[name].isfinite().all()]
    if broken:
        fault = f"model.init_from: numbers that are not finite in {in_short(broken)}; use weights that are whole"
        raise ConfigError([fault], str(path))
    return {name: weights[name] for name in shapes}


def _check_function(theirs: PreTrainedConfig, ours: PreTrainedConfig, path: Path) -> None:
    """Raises :class:`ConfigError` with every difference by which the same weights would compute something else."""
    faults = [
        f"model.init_from: {key} is {there!r} there and {here!r} in model.config; "
        f"set model.overrides.{key}, or leave model.config and overrides out"
        for key, there, here in function_differences(theirs, ours)
    ]
    if faults:
        raise ConfigError(faults, str(path))
