"""Held-out loss in nats per predicted token, perplexity, and bits per UTF-8 byte of the text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from relora_mora.config import Config
from relora_mora.data import EvalSet, load_eval_set
from relora_mora.model import IGNORE, bytes_per_logit, chunked_cross_entropy, loss_chunk


@dataclass(frozen=True)
class EvalResult:
    """``nats`` is the sum over ``tokens`` predicted tokens of text that has ``utf8_bytes`` bytes.

    End-of-document tokens are predicted and counted in ``tokens``; they add no bytes.
    """

    nats: float
    tokens: int
    utf8_bytes: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.utf8_bytes

    def as_dict(self) -> dict[str, float | int]:
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens}


def held_out(config: Config) -> EvalSet:
    """The evaluation set of a run. Raises the errors of :func:`load_eval_set`."""
    data = config.data
    return load_eval_set(
        data.validation,
        config=data,
        tokenizer_path=config.tokenizer.path,
        sequence_length=data.sequence_length,
        max_tokens=config.eval.max_tokens,
    )


@torch.no_grad()
def evaluate(
    mean_loss: Callable[[Tensor, Tensor], Tensor],
    data: EvalSet,
    *,
    micro_batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    all_sum: Callable[[Tensor], Tensor] = lambda values: values,
    stop: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """Scores every token of ``data`` once, whatever the number of ranks.

    ``mean_loss(input_ids [b, T], labels [b, T])`` gives the mean nats of the labels that are not -100; ``all_sum`` sums
    over the ranks. All ranks score as many batches, some of them empty: ZeRO-3 gathers weights in each. ``stop`` is asked
    before each, with the same answer on all ranks; when it is true the result is None.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for input_ids, labels in data.batches(rank, world_size, micro_batch_size):
        if stop():
            return None
        count = (labels != IGNORE).sum()
        loss = mean_loss(input_ids.to(device), labels.to(device))
        totals[0] += loss.double() * count.to(device)
        totals[1] += count.to(device)
    nats, tokens = all_sum(totals).tolist()
    assert round(tokens) == data.predicted, f"scored {tokens:.0f} tokens of {data.predicted}"
    return EvalResult(nats, data.predicted, data.utf8_bytes)


def causal_lm_loss(lm: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """``mean_loss`` of any causal language model of transformers; a LLaMA's logits are never whole, others' in float32 in chunks."""
    if isinstance(lm, LlamaForCausalLM):
        head = lm.get_output_embeddings().weight
        return lambda input_ids, labels: chunked_cross_entropy(lm.model(input_ids, use_cache=False).last_hidden_state, head, labels)

    def mean_loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = lm(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)  # [N, V]
        target = labels.flatten()
        rows = loss_chunk(logits.shape[0], logits.shape[1], bytes_per_logit(logits.dtype, in_place=False))
        pieces = zip(logits.split(rows), target.split(rows), strict=True)
        total = torch.stack([F.cross_entropy(piece.float(), want, ignore_index=IGNORE, reduction="sum") for piece, want in pieces]).sum()
        return total / (target != IGNORE).sum().clamp(min=1)

    return mean_loss
