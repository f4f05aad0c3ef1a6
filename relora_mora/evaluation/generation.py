"""Greedy generation with a causal language model, and a comparison with the answers of held-out records."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from relora_mora.data.held_out import Answer
from relora_mora.data.records.passages import special_tokens
from relora_mora.evaluation.loss import ALONE, Ranks
from relora_mora.model.documents import SDPA_OR_DOCUMENTS
from relora_mora.system.hardware import to_device


class Generated(NamedTuple):
    """Counts over generated answers: how many are ``exact``, and how many of their ``characters`` agree by position."""

    answers: int
    exact: int
    characters: int
    agreeing: int

    @staticmethod
    def of_all(results: "Iterable[Generated]") -> "Generated":
        """The total over several sets."""
        return Generated(*map(sum, zip(*results, strict=True)))

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


def agreeing_characters(generated: str, expected: str) -> int:
    """How many characters of ``expected`` are at the same position in ``generated``."""
    return sum(a == b for a, b in zip(generated, expected, strict=False))


@torch.no_grad()
def generate_answers(
    lm: PreTrainedModel,
    answers: Sequence[Answer],
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Generated:
    """Generates each answer once, for any number of ranks, with batches of ``batch_size`` on each rank.

    As many tokens are generated as the expected answer has. Both texts end before the first special token, such as EOS.
    If an answer begins with special tokens, as in some templates, they are given as part of the prompt. All ranks make
    the same number of forward passes, since ZeRO-3 gathers weights in each.
    """
    counts = torch.zeros(4, dtype=torch.float64)
    special = special_tokens(tokenizer)
    ordered = sorted(  # batches of similar lengths need little padding
        (_with_leading_tokens_in_prompt(each, special) for each in answers), key=lambda each: len(each.prompt)
    )
    per_round = batch_size * ranks.world_size
    for first in range(0, len(ordered), per_round):
        ranks.go_on(True)
        all_ranks = ordered[first : first + per_round]
        own = all_ranks[ranks.rank :: ranks.world_size]
        batch = own or all_ranks[:1]  # a rank without an answer takes part in the forward passes
        prompts = [torch.from_numpy(each.prompt) for each in batch]
        wanted = [len(each.answer) for each in batch]
        tokens = greedy(lm, prompts, max(len(each.answer) for each in all_ranks), device, wanted).tolist()
        for ids, (_, answer) in zip(tokens, own, strict=False):
            expected = text_of(tokenizer, answer.tolist(), special)
            generated = text_of(tokenizer, ids[: len(answer)], special)
            same = agreeing_characters(generated, expected)
            counts += counts.new_tensor([1, generated == expected, len(expected), same])
    return Generated(*map(round, ranks.all_sum(counts.to(device)).tolist()))


def _with_leading_tokens_in_prompt(answer: Answer, special: Set[int]) -> Answer:
    """Moves leading special tokens of an answer to the end of its prompt, unless the answer has no other tokens."""
    ids = answer.answer.tolist()
    begin = next((index for index, token in enumerate(ids) if token not in special), 0)
    return Answer(np.concatenate([answer.prompt, answer.answer[:begin]]), answer.answer[begin:])


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], special: Set[int]) -> str:
    """The text before the first of the ``special`` tokens."""
    end = next((index for index, token in enumerate(ids) if token in special), len(ids))
    return str(tokenizer.decode(ids[:end]))


@torch.no_grad()
def greedy(
    lm: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    new_tokens: int,
    device: torch.device,
    wanted: Sequence[int] | None = None,
) -> torch.Tensor:
    """Continues B prompts [length of each] with their most probable tokens, int64 [B, new_tokens].

    The result is that of ``generate`` in transformers without a stop before ``new_tokens``. ``lm`` is in evaluation
    mode. Only the first ``wanted`` tokens of a row are valid. Later ones stay at the position of the last valid token,
    so that a row that fits the model's positions never exceeds them, which would stretch dynamic rotary embeddings for
    all rows.
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
    takes = inspect.signature(lm.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # newer and older versions of transformers
    generated = []
    with attention_with_a_mask(lm), torch.compiler.set_stance("force_eager"):  # each length would compile again
        for _ in range(new_tokens):
            given = {"position_ids": positions, "logits_to_keep": 1}
            given = {key: value for key, value in given.items() if key in takes}  # ALiBi finds positions in the mask
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=True, **given, **{name: cache}).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            generated.append(ids)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = torch.minimum(positions[:, -1:] + 1, last)
    return torch.cat(generated, dim=1)


@contextlib.contextmanager
def attention_with_a_mask(lm: PreTrainedModel) -> Iterator[None]:
    """Replaces the trainer's own attention, which takes document boundaries and no padding mask, by sdpa."""
    before = lm.config._attn_implementation
    if before == SDPA_OR_DOCUMENTS:
        lm.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        lm.config._attn_implementation = before
