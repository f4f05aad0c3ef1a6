"""The values that a run's parameters begin with: each made by one rank, and put where it belongs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from relora_mora.checkpoint import CheckpointReader
from relora_mora.config import Config, ConfigError
from relora_mora.cycle import Base
from relora_mora.export import find_checkpoint, load_foreign, merged_weights
from relora_mora.model import initial_value
from relora_mora.zero import ZeroEngine, from_first_rank


def initial_values(lm: LlamaForCausalLM, base: Base, config: Config) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Which rank makes which parameter of the plain model, and what this rank has made of them, in float32; a collective.

    The ranks draw at the same time, a part each; ``model.init_from`` is read by the first rank.
    """
    shapes = {name: p.shape for name, p in lm.named_parameters() if p.is_meta}
    made: dict[str, Tensor] = {}
    if config.model.init_from is not None:
        from_first_rank(lambda: made.update(_foreign_weights(config, lm, shapes)))
        return dict.fromkeys(shapes, 0), made
    maker, load = dict(base.owner), [0] * int(os.environ["WORLD_SIZE"])
    for name, shape in sorted(shapes.items(), key=lambda item: item[0] not in base.owner):  # what trains goes to who has least
        load[maker.setdefault(name, load.index(min(load)))] += shape.numel()
    return maker, {name: initial_value(lm, name, config.train.seed) for name in shapes if maker[name] == base.rank}


def write_initial_values(engine: ZeroEngine, base: Base, maker: Mapping[str, int], made: dict[str, Tensor]) -> None:
    """Puts initial values where they belong, one parameter after the other; a collective.

    What is frozen goes to the base of its owner, and from there to all in the precision that they compute with; of what trains
    each rank takes the part of the float32 master that it owns.
    """
    for name, rank in maker.items():
        owner, value = base.owner.get(name), made.pop(name, None)
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
            base.weights[name] = value.cpu()
    base.push(engine)
    engine.refresh()


def _foreign_weights(config: Config, lm: LlamaForCausalLM, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The float32 weights of ``model.init_from`` by the names of ours; raises :class:`ConfigError` where they do not fit."""
    path = Path(str(config.model.init_from))
    if (path / "config.json").exists():
        weights = load_foreign(path, torch.float32, LlamaForCausalLM).state_dict()
    else:
        weights = merged_weights(CheckpointReader(find_checkpoint(path)))
    wrong = [name for name, shape in shapes.items() if name not in weights or weights[name].shape != shape]
    if wrong:
        found = tuple(weights[wrong[0]].shape) if wrong[0] in weights else "nothing"
        raise ConfigError(
            [
                f"model.init_from: {path} does not fit model.config: {len(wrong)} weights differ, e.g. {wrong[0]} "
                f"is {found} there and {tuple(shapes[wrong[0]])} here; use its model configuration"
            ],
            "the settings",
        )
    embedding = weights["model.embed_tokens.weight"]
    if lm.config.tie_word_embeddings and not torch.equal(embedding, weights.get("lm_head.weight", embedding)):
        raise ConfigError(
            [
                f"model.init_from: {path} has an output head of its own, but model.config ties it to the embeddings; "
                "set model.overrides.tie_word_embeddings=false"
            ],
            "the settings",
        )
    return {name: weights[name] for name in shapes}
