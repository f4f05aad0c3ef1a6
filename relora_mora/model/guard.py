"""Compares a model with plain transformers at the start of a run, on a small twin.

The twin has the same config with fewer layers and heads, a smaller vocabulary, narrow feed-forward layers and short
windows. Its weights are larger than initial ones, which would hide differences.
"""

import copy
import math
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
WIDTH = 128  # of its feed-forward layers
VOCABULARY = 512
WINDOW = 16  # tokens
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


def examine(model_config: PreTrainedConfig, *, attention: str, documents: bool) -> Findings:
    """Compares the loss of a model's twin with transformers', and its documents in a sequence with the same alone.

    ``documents``: whether a run keeps them apart. Raises :class:`ConfigError` with the numbers if something differs.
    """
    kind = model_config.model_type
    with torch.no_grad():
        try:
            try:
                module, ids, theirs, ours = _losses(_twin(_narrow(model_config), attention))
            except Exception:  # transformers raises nearly any kind, also for widths that depend on each other
                module, ids, theirs, ours = _losses(_twin(model_config, attention))
        except Exception as error:
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
        return Findings(_passes_boundaries(module.lm, ids), difference)


def _losses(plain: PreTrainedModel) -> tuple[LossModel, Tensor, float, float]:
    """A twin as this package runs it, a batch, and its loss in transformers and here."""
    module = LossModel(copy.deepcopy(plain)).eval()
    ids = torch.randint(plain.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    theirs = float(plain(input_ids=ids, labels=ids, use_cache=False).loss)
    return module, ids, theirs, float(module(ids, F.pad(ids[:, 1:], (0, 1), value=IGNORE)))


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
    before = lm.config._attn_implementation
    lm.config._attn_implementation = _RECORDS
    try:
        body_of(lm)[1](input_ids=ids, boundaries=ids)
    except Exception:  # a forward that takes no other arguments
        return False
    finally:
        lm.config._attn_implementation = before
    return bool(passed) and all(passed)


def _narrow(model_config: PreTrainedConfig) -> PreTrainedConfig:
    """A config with as few heads as keep their widths and groups, and with their part of the hidden size."""
    heads, hidden = model_config.num_attention_heads, model_config.hidden_size
    common = math.gcd(heads, getattr(model_config, "num_key_value_heads", None) or heads, hidden)
    factor = common // 2 if common % 2 == 0 else 1
    config = copy.deepcopy(model_config)
    for key, value in vars(model_config).items():
        if key in ("num_attention_heads", "num_key_value_heads", "n_head", "n_heads") or value == hidden:
            setattr(config, key, value and value // factor)
    return config


def _twin(model_config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    config = copy.deepcopy(model_config)
    kinds = getattr(config, "layer_types", None) or []
    count = config.num_hidden_layers
    layers = min(
        count, max(LAYERS, *(kinds.index(kind) + 1 for kind in kinds), getattr(config, "first_k_dense_replace", 0) + 1)
    )
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:  # a value for each layer
            setattr(config, key, value[:layers])
    smaller = {"vocab_size": VOCABULARY, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH}
    smaller |= {"sliding_window": WINDOW, "attention_chunk_size": WINDOW, "num_hidden_layers": layers}
    for key, most in smaller.items():
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
