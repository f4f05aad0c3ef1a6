"""Greedy generation with a causal language model, and how near generated answers come to those of held-out records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from relora_mora.data.sets.held_out import Answer
from relora_mora.distributed.waiting import collective
from relora_mora.system.hardware import to_device
from relora_mora.weights.generation_config import special_tokens


@dataclass(frozen=True)
class Generated:
    """Of ``answers`` so many are ``exact``, and of their ``characters`` so many agree, place by place."""

    answers: int
    exact: int
    characters: int
    agreeing: int

    @staticmethod
    def of_all(results: Iterable[Generated]) -> Generated:
        """That of several sets as one."""
        return Generated(*map(sum, zip(*map(astuple, results), strict=True)))

    def as_dict(self) -> dict[str, float]:
        return {
            "exact_match": self.exact / self.answers,
            "character_accuracy": self.agreeing / max(1, self.characters),
            "answers": self.answers,
        }

    def __str__(self) -> str:
        shares = self.as_dict()
        return (
            f"{shares['exact_match']:.1%} of {self.answers:,} answers generated, "
            f"{shares['character_accuracy']:.1%} of their characters"
        )


def agreeing_characters(found: str, expected: str) -> int:
    """How many characters of ``expected`` stand at the same place in ``found``."""
    return sum(a == b for a, b in zip(found, expected, strict=False))


@torch.no_grad()
def generate_answers(
    lm: PreTrainedModel,
    answers: Sequence[Answer],
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    all_sum: Callable[[Tensor], Tensor] = lambda values: values,
    stop: Callable[[], bool] = lambda: False,
) -> Generated | None:
    """Generates each answer once, whatever the number of ranks, ``batch_size`` at a time on each.

    As many tokens are generated as the answer has, and those from the first special token on, such as EOS, are left
    out on both sides; special tokens that an answer begins with, as some templates mark it, are given like the prompt.
    All ranks make the same number of forward passes, since ZeRO-3 gathers weights in each. ``stop`` and ``all_sum`` are
    those of :func:`relora_mora.evaluation.loss.evaluate`; where ``stop()`` is true the result is None.
    """
    counts = torch.zeros(4, dtype=torch.float64)
    special = special_tokens(tokenizer)
    begun = [_begun(each, special) for each in answers]
    ordered = sorted(begun, key=lambda each: len(each.prompt))  # little to fill up
    per_round = batch_size * world_size
    for first in range(0, len(ordered), per_round):
        if stop():
            return None
        of_all = ordered[first : first + per_round]
        own = of_all[rank::world_size]
        made = own or of_all[:1]
        prompts = [torch.from_numpy(each.prompt) for each in made]
        wanted = [len(each.answer) for each in made]
        with collective():  # at ZeRO-3 a host that reads from its GPU waits for other ranks, as transformers' masks do
            tokens = greedy(lm, prompts, max(len(each.answer) for each in of_all), device, wanted).tolist()
        for ids, (_, answer) in zip(tokens, own, strict=False):
            expected = text_of(tokenizer, answer.tolist(), special)
            found = text_of(tokenizer, ids[: len(answer)], special)
            same = agreeing_characters(found, expected)
            counts += counts.new_tensor([1, found == expected, len(expected), same])
    return Generated(*map(round, all_sum(counts.to(device)).tolist()))


def _begun(answer: Answer, special: Set[int]) -> Answer:
    """With the special tokens that an answer begins with as the end of its prompt, if it has others."""
    ids = answer.answer.tolist()
    begin = next((place for place, token in enumerate(ids) if token not in special), 0)
    return Answer(np.concatenate([answer.prompt, answer.answer[:begin]]), answer.answer[begin:])


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], special: Set[int]) -> str:
    """The text up to the first of the ``special`` tokens."""
    end = next((place for place, token in enumerate(ids) if token in special), len(ids))
    return str(tokenizer.decode(ids[:end]))


@torch.no_grad()
def greedy(
    lm: PreTrainedModel,
    prompts: Sequence[Tensor],
    new_tokens: int,
    device: torch.device,
    wanted: Sequence[int] | None = None,
) -> Tensor:
    """Prompts [length of each] -> int64 [B, new_tokens], the most probable continuation of each.

    What ``generate`` of transformers finds, without an end before ``new_tokens``. ``lm`` is in evaluation mode. Of a
    row the first ``wanted`` tokens are right, and those behind are made at the position of the last of these: a row
    that fits the model's positions never goes beyond them, which would stretch dynamic rotary embeddings for all.
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    lengths = torch.tensor(wanted or [new_tokens] * len(prompts))
    ids, mask, lengths = (to_device(tensor, device) for tensor in (ids, mask, lengths))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    last = positions[:, -1:] + lengths[:, None] - 1
    cache = DynamicCache(config=lm.config)
    found = []
    with _attention_with_a_mask(lm), torch.compiler.set_stance("force_eager"):  # each length would be a new program
        for _ in range(new_tokens):
            # by place: what takes the cache has another name in newer versions of transformers
            logits = lm(ids, mask, positions, cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            found.append(ids)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = torch.minimum(positions[:, -1:] + 1, last)
    return torch.cat(found, dim=1)


@contextlib.contextmanager
def _attention_with_a_mask(lm: PreTrainedModel) -> Iterator[None]:
    """The trainer's own attention knows documents by their boundaries, and takes no mask over a prompt's length."""
    before = lm.config._attn_implementation
    lm.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        lm.config._attn_implementation = before
