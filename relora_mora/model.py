"""The LLaMA model: built from a ``LlamaConfig`` with a seed, wrapped with its training loss.

The wrapper computes the loss from hidden states in chunks of tokens, so that float32 logits [tokens, vocabulary] never
exist as a whole. Shapes: ``B`` sequences, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary, ``N = B * T``.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import is_flash_attn_2_available

from relora_mora.config import Config, ConfigError
from relora_mora.kernels import cross_entropy_, takes_logits
from relora_mora.seeds import derived_seed

IGNORE = -100
RECOMPILE_LIMIT = 64  # each operator of a cycle, training and evaluation, and the short batch at the end have a program of their own
CHUNK_BYTES = 192 * 2**20  # of logits that exist at once


def check_compiler(config: Config) -> None:
    """Raises :class:`ConfigError` when torch.compile would find no compiler: C++ on a CPU, C on a GPU, for Triton's launchers."""
    if torch.cuda.is_available():
        language, variable, names = "C", "CC", ("gcc", "clang")
    else:
        language, variable, names = "C++", "CXX", ("g++", "clang++")
    if config.model.compile and not any(map(shutil.which, (os.environ.get(variable, names[0]), names[1]))):
        raise ConfigError(
            [
                f"model.compile: torch.compile needs a {language} compiler here, and there is no {names[0]}; install it, name one in {variable}, "
                "or leave it false"
            ],
            "the settings",
        )


def check_attention(config: Config, *, bf16: bool) -> None:
    """Raises :class:`ConfigError` where ``model.attention`` cannot be computed here."""
    if config.model.attention != "flash_attention_2" or (bf16 and is_flash_attn_2_available()):
        return
    fault = (
        "model.attention: flash_attention_2 needs its package (flash-attn), a GPU, and train.precision=bf16; "
        "use model.attention=sdpa, which takes PyTorch's own flash kernels where it can"
    )
    raise ConfigError([fault], "the settings")


def build_model(model_config: LlamaConfig, *, seed: int, attention: str = "sdpa") -> LlamaForCausalLM:
    """A float32 model on the CPU with initial weights that depend on the seed only."""
    lm = empty_model(model_config, attention=attention)
    put_values(lm, {name: initial_value(lm, name, seed) for name, _ in lm.named_parameters()})
    return lm


def empty_model(model_config: LlamaConfig, *, attention: str = "sdpa") -> LlamaForCausalLM:
    """The model with float32 parameters on the meta device, which hold nothing; :func:`put_values` gives them their values."""
    with torch.device("meta"):
        lm = LlamaForCausalLM._from_config(model_config, attn_implementation=attention, dtype=torch.float32)
    lm.model.rotary_emb = LlamaRotaryEmbedding(config=model_config)  # the only buffers, which are no drawn values
    lm.model.embed_tokens.padding_idx = None  # nothing is padded: pad_token_id names a token that trains
    return lm


@torch.no_grad()
def initial_value(lm: LlamaForCausalLM, name: str, seed: int) -> Tensor:
    """The float32 value that a parameter of the plain model begins with; distributed as transformers initializes it.

    It follows from seed, name and shape alone: the same on every rank and world size, in whatever order they are drawn.
    """
    shape = lm.get_parameter(name).shape
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)  # a norm's
    generator = torch.Generator().manual_seed(derived_seed(seed, "initial", name))
    return torch.empty(shape).normal_(0.0, lm.config.initializer_range, generator=generator)


def put_values(lm: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts tensors, of any device and dtype, in the place of the parameters of these names; tied ones stay tied."""
    new = {id(old): nn.Parameter(values[name], old.requires_grad) for name, old in lm.named_parameters() if name in values}
    for module in lm.modules():
        for key, old in module._parameters.items():
            if id(old) in new:
                module._parameters[key] = new[id(old)]


class LossModel(nn.Module):
    """A causal LM together with its loss, the mean nats per predicted token.

    ``compiled`` has torch.compile make one program of each decoder layer; head and loss have kernels of their own.
    """

    def __init__(self, lm: LlamaForCausalLM, *, compiled: bool = False) -> None:
        super().__init__()
        self.lm = lm
        lm.lm_head = LossHead(lm.lm_head)
        if compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
            for layer in lm.model.layers:
                layer.compile()

    def forward(self, input_ids: Tensor, labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """input_ids [B, T] and labels [B, T] (already shifted, -100 is not scored) -> mean nats per predicted token.

        With document_ids [B, T] every document sees what it sees where it is scored alone: itself, from position 0 on.
        """
        separate: dict[str, Tensor] = {}
        if document_ids is not None:
            separate["attention_mask"] = document_mask(document_ids, self.lm.model.norm.weight.dtype)
            separate["position_ids"] = document_positions(document_ids)
        hidden = self.lm.model(input_ids=input_ids, use_cache=False, **separate).last_hidden_state
        return self.lm.lm_head(hidden, labels)


class LossHead(nn.Module):
    """The output head; with labels it returns their mean negative log-likelihood in place of logits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None, "LLaMA's head has no bias"
        self.weight: Tensor = linear.weight  # [V, H], the same tensor where embeddings are tied

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [..., H] -> logits [..., V], or with labels [...] a float32 scalar"""
        if labels is None:
            return F.linear(hidden, self.weight)
        return chunked_cross_entropy(hidden, self.weight, labels)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Mean cross-entropy of ``softmax(hidden @ weight.T)`` over the labels that are not -100, a float32 scalar.

    hidden [..., H], weight [V, H], labels [...]. The gradients are computed in forward, chunk by chunk (as in Liger
    kernels, arXiv 2410.10989, section 3.2): one logits product in all, and of size [N, V] nothing is ever kept. With no
    label to score the result is 0. Raises IndexError for a label that is not in the vocabulary. On CUDA liger-kernel's own
    kernels do the same where the package is installed (then a wrong label is not found out).
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if chunk_tokens is None and (fused := fused_loss(hidden.device.type)) is not None:
        return fused(flat, weight, labels, ignore_index=IGNORE, accum_dtype=torch.float32).float()
    # inside forward grad is always off and parameters always ask for theirs: whether anybody wants one is known here
    return _ChunkedCrossEntropy.apply(flat, weight, labels, chunk_tokens, torch.is_grad_enabled())


@functools.cache
def fused_loss(device: str) -> Callable[..., Tensor] | None:
    """liger-kernel's cross-entropy of a linear layer for tensors on such a device, None where there is none."""
    if device != "cuda":
        return None
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    function: Callable[..., Tensor] = liger_fused_linear_cross_entropy
    return function


def loss_chunk(tokens: int, vocabulary: int, bytes_per_logit: int) -> int:
    """Tokens whose logits exist at once: equal parts of all, of at most ``CHUNK_BYTES``, but not less than 128."""
    parts = max(1, math.ceil(tokens * vocabulary * bytes_per_logit / CHUNK_BYTES))
    return max(128, math.ceil(tokens / parts))


def bytes_per_logit(dtype: torch.dtype, *, in_place: bool) -> int:
    """Where the loss does not work in place, logits that are not float32 have a copy in float32."""
    return dtype.itemsize + (0 if in_place or dtype is torch.float32 else 4)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, training: bool) -> Tensor:
        """hidden [N, H], weight [V, H], labels [N]"""
        needs_hidden, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        scale, gradient = 1.0 / (labels != IGNORE).sum().clamp(min=1), needs_hidden or needs_weight
        chunk = chunk or loss_chunk(len(hidden), len(weight), bytes_per_logit(hidden.dtype, in_place=takes_logits(hidden)))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        for start in range(0, len(hidden), chunk):
            piece, target = hidden[start : start + chunk], labels[start : start + chunk]
            loss, d_logits = cross_entropy_(F.linear(piece, weight), target, ignore=IGNORE, scale=scale, gradient=gradient)
            total += loss
            if d_hidden is not None and d_logits is not None:
                d_hidden[start : start + chunk] = d_logits @ weight
            if needs_weight and d_logits is not None:
                part = d_logits.T @ piece
                d_weight = part if d_weight is None else d_weight.float() + part  # the parts add up in float32
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scale = grads[0]
        if scale.device.type == "cpu" and scale == 1:  # elsewhere to look at it would wait for the device
            return *ctx.saved_tensors, None, None, None
        d_hidden, d_weight = (None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None


def document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """document_ids [B, T] -> mask [B, 1, T, T] to add to scores: causal, and only within a document.

    Not boolean: sdpa would make this one of it in each layer, and keep each for backward.
    """
    same = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    return mask.masked_fill_(~same.tril(), -math.inf).unsqueeze(1)


def document_positions(document_ids: Tensor) -> Tensor:
    """document_ids [B, T], which never decrease -> int64 [B, T]: the place of each token in its document."""
    place = torch.arange(document_ids.shape[-1], device=document_ids.device).expand(document_ids.shape)
    begins = document_ids.diff(dim=-1, prepend=document_ids[:, :1]) != 0
    return place - (place * begins).cummax(dim=-1).values
