"""Compares a model with plain transformers at the start of a run, on a small twin.

The twin has the same config with fewer layers, a smaller vocabulary, narrow feed-forward layers and short windows. Its
weights are larger than initial ones, which would hide differences.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from relora_mora.config.load import ConfigError
from relora_mora.data.stream.packing import document_boundaries
from relora_mora.model.causal import LossModel, body_of, empty_model, put_values
from relora_mora.model.config import LLAMA_FAMILY
from relora_mora.model.loss import IGNORE

LAYERS = 2  # of the twin, or more until every kind of layer has appeared
WINDOW = 16  # tokens
SMALLER = {  # the largest values of the twin's sizes
    **{"vocab_size": 512, "intermediate_size": 128, "moe_intermediate_size": 128},
    **{"sliding_window": WINDOW, "attention_chunk_size": WINDOW},
}
LENGTH = 48  # tokens of a sequence, more than a window
TOLERANCE = 1e-4  # of the loss and of hidden states, relative; families differ by 1e-6, leaks are above 1e-1
_RECORDS = "relora_mora_records_boundaries"


@dataclass(frozen=True)
class Findings:
    """What a start has found out about a model."""

    passes_boundaries: bool  # every layer passes the boundaries of documents on to its attention
    difference: float  # of the loss from transformers', in nats


def compared_by_tests(model_config: PreTrainedConfig) -> bool:
    """Whether the model is of the LLaMA family and has no windows, so that a start need not compare it again."""
    kinds = set(getattr(model_config, "layer_types", None) or ["full_attention"])
    windowed = getattr(model_config, "sliding_window", None) is not None
    return model_config.model_type in LLAMA_FAMILY and kinds == {"full_attention"} and not windowed


@torch.no_grad()
def examine(model_config: PreTrainedConfig, *, attention: str, documents: bool) -> Findings:
    """Compares the loss of a model's twin with transformers', and its documents in a sequence with the same alone.

    ``documents``: whether a run keeps them apart. Raises :class:`ConfigError` with the numbers if something differs.
    """
    kind = model_config.model_type
    try:
        plain = _twin(model_config, attention)
        ids = torch.randint(plain.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        theirs = float(plain(input_ids=ids, labels=ids, use_cache=False).loss)
        module = LossModel(plain).eval()
        ours = float(module(ids, F.pad(ids[:, 1:], (0, 1), value=IGNORE)))
    except Exception as error:  # transformers raises nearly any kind
        fault = f"model: transformers cannot run a small {kind}: {' '.join(str(error).split())[:300]}"
        raise ConfigError([fault], "model.config") from error
    difference = abs(theirs - ours)
    faults = []
    if not difference <= TOLERANCE * max(1.0, abs(theirs)):
        faults.append(f"model: the loss of a small {kind} is {theirs:.6f} in transformers and {ours:.6f} here")
    if documents and (leak := _leak(module, ids)) > TOLERANCE:
        faults.append(
            f"data.document_mask: in a {kind}, documents change each other (hidden states by {leak:.2g} of the "
            "largest); use data.packing=stream without a mask, or another model"
        )
    if faults:
        raise ConfigError(faults, f"what a {kind} computes")
    return Findings(_passes_boundaries(plain, ids), difference)


def _leak(module: LossModel, ids: Tensor) -> float:
    """How much hidden states of documents change if they share a sequence, relative to the largest."""
    cut = LENGTH // 3
    numbers = torch.zeros_like(ids)
    numbers[:, cut:] = 1
    packed = module.hidden(ids, document_boundaries(numbers))
    alone = torch.cat([module.hidden(part, None) for part in (ids[:, :cut], ids[:, cut:])], dim=1)
    return float((packed - alone).abs().max() / alone.abs().max())


def _passes_boundaries(lm: PreTrainedModel, ids: Tensor) -> bool:
    passed: list[bool] = []

    def attend(*args: Any, boundaries: Tensor | None = None, **settings: Any) -> Any:
        passed.append(boundaries is ids)
        return sdpa_attention_forward(*args, **settings)

    AttentionInterface.register(_RECORDS, attend)
    lm.config._attn_implementation = _RECORDS
    try:
        body_of(lm)[1](input_ids=ids, boundaries=ids)
    except Exception:  # a forward that takes no other arguments
        return False
    return bool(passed) and all(passed)


def _twin(model_config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    config = copy.deepcopy(model_config)
    kinds = getattr(config, "layer_types", None) or []
    count = config.num_hidden_layers
    every_kind = max([kinds.index(kind) + 1 for kind in kinds] or [0])
    layers = min(count, max(LAYERS, every_kind, getattr(config, "first_k_dense_replace", 0) + 1))
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:  # a value for each layer
            setattr(config, key, value[:layers])
    for key, most in {**SMALLER, "num_hidden_layers": layers}.items():
        value = getattr(config, key, None)
        if isinstance(value, int) and value > most:
            setattr(config, key, most)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    lm = empty_model(config, attention=attention)
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, parameter in lm.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        values[name] = value / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.1 * value
    put_values(lm, values)
    return lm.eval()
