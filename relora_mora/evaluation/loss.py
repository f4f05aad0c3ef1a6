"""Held-out loss in nats per token, perplexity, and bits per UTF-8 byte; and how ranks share an evaluation."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from relora_mora.config.data import DataConfig, set_setting
from relora_mora.data.errors import SourceError
from relora_mora.data.held_out import EvalSet, load_eval_set
from relora_mora.data.stream.packing import document_boundaries
from relora_mora.model.loss import IGNORE
from relora_mora.system.hardware import to_device


@dataclass(frozen=True)
class Ranks:
    """The ranks that share an evaluation; the defaults are those of one process.

    They call each function together. ``all_sum`` sums a tensor over them, and ``gather`` returns the values of all.
    ``go_on`` is called before each batch: it says whether one of them is still running, and may raise an exception on
    all.
    """

    rank: int = 0
    world_size: int = 1
    all_sum: Callable[[Tensor], Tensor] = lambda values: values
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    go_on: Callable[[bool], bool] = lambda running: running


ALONE = Ranks()
MeanLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class EvalResult:
    """The summed loss ``nats`` over ``tokens`` predicted tokens of a text with ``utf8_bytes`` bytes.

    End-of-document tokens are predicted and counted in ``tokens``; they add no bytes. If only part of a text is scored,
    as with records, its bytes are None. Losses are comparable if ``digest`` is the same
    (:class:`relora_mora.data.held_out.EvalSet`). The digest of several texts does not depend on their order.
    """

    nats: float
    tokens: int
    utf8_bytes: int | None
    digest: str

    @staticmethod
    def of_all(results: "Iterable[EvalResult]") -> "EvalResult":
        """The total over several texts; every token has the same weight."""
        results = list(results)
        sizes = [each.utf8_bytes for each in results if each.utf8_bytes is not None]
        digests = sorted(each.digest for each in results)
        return EvalResult(
            sum(each.nats for each in results),
            sum(each.tokens for each in results),
            sum(sizes) if len(sizes) == len(results) else None,
            digests[0] if len(digests) == 1 else xxhash.xxh3_64_hexdigest(" ".join(digests).encode()),
        )

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.utf8_bytes is None else self.nats / math.log(2) / self.utf8_bytes

    def as_dict(self) -> dict[str, float | int | str]:
        bits = self.bits_per_byte
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            **({} if bits is None else {"bits_per_byte": bits}),
            "tokens": self.tokens,
            "digest": self.digest,
        }

    def __str__(self) -> str:
        bits = self.bits_per_byte
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}" + (
            "" if bits is None else f", {bits:.4f} bits per byte"
        )


def held_out(data: DataConfig, tokenizer_path: str, max_tokens: int | None, answers: int = 0) -> dict[str, EvalSet]:
    """The sets of ``data.validation`` by name, each with at most ``max_tokens``; a single set without a name is "".

    ``answers`` is how many answers of each set to generate. Raises the errors of :func:`load_eval_set`, with the name
    of the set.
    """
    sets = {}
    for name, sources in data.validation.items():
        try:
            sets[name] = load_eval_set(
                sources,
                config=data,
                tokenizer_path=tokenizer_path,
                sequence_length=data.sequence_length,
                max_tokens=max_tokens,
                answers=answers,
            )
        except SourceError as error:
            if not name:
                raise
            raise SourceError(f"{set_setting(name)}: {error}") from error
    return sets


@torch.no_grad()
def evaluate(
    mean_loss: MeanLoss,
    sets: Mapping[str, EvalSet],
    *,
    micro_batch_size: int,
    device: torch.device,
    shrinks: bool = True,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, EvalResult]:
    """Scores every token of each set once, for any number of ranks; returns the results by name.

    ``mean_loss(input_ids [b, T], labels [b, T], boundaries [P + 1] or None)`` returns the mean nats of the labels that
    are not -100; with boundaries (:func:`document_boundaries`) each document is scored independently. ``shrinks``:
    batches of few sequences are no larger than needed. ``progress`` is called after each batch with the tokens scored
    so far, which one of several ranks estimates, and the tokens of all sets.

    All ranks score the same number of batches, some of them empty, since ZeRO-3 gathers weights in each. The host
    waits for the device, and thus for other ranks under ZeRO-3, only at the end of a set.
    """
    total = sum(data.predicted for data in sets.values())
    before = 0
    results: dict[str, EvalResult] = {}
    for name, data in sets.items():
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        scored = 0
        for input_ids, labels, documents in data.batches(
            ranks.rank, ranks.world_size, micro_batch_size, shrinks=shrinks
        ):
            ranks.go_on(True)
            count = int((labels != IGNORE).sum())
            boundaries = None if documents is None else to_device(document_boundaries(documents), device)
            loss = mean_loss(to_device(input_ids, device), to_device(labels, device), boundaries)
            sums[0] += loss.double() * count
            sums[1] += count
            scored += count * ranks.world_size
            progress(before + min(scored, data.predicted), total)
        nats, tokens = ranks.all_sum(sums).tolist()
        assert round(tokens) == data.predicted, f"scored {tokens:.0f} tokens of {data.predicted}"
        results[name] = EvalResult(nats, data.predicted, data.utf8_bytes, data.digest)
        before += data.predicted
    return results


@torch.no_grad()
def is_causal(lm: nn.Module, device: torch.device) -> bool:
    """Whether a language model predicts a token only from earlier tokens, unlike an encoder such as BERT."""
    pair = torch.tensor([[1, 2, 3], [1, 2, 0]], device=device)
    logits = lm(input_ids=pair, use_cache=False).logits[:, :2].float()
    return torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-3, equal_nan=True)
