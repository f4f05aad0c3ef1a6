"""Adds tokens to a BPE tokenizer: its training is continued on a text, so that old ids and old merges stay.

Each new token is the pair of tokens that is most frequent in the text, and its merge comes after all others. So every
new token can be reached, which pieces of another tokenizer could not be: BPE builds a token only from its parts.
"""

import heapq
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relora_mora.tokenizer.files import DESCRIPTION, MODEL_FILE, TokenizerError
from relora_mora.tokenizer.identity import save_tokenizer, vocabulary_size
from relora_mora.tokenizer.load import HARD_TEXTS, encode, load_tokenizer

SPACE = "\u2581"  # sentencepiece's mark for a space
# what sentencepiece's trainer keeps in a piece: spaces before letters, one digit, or signs
_WORD = re.compile(rf"{SPACE}*(?:[^\W\d_]+|\d|[^\w{SPACE}]+|_+)|{SPACE}+")
_DIGITS = re.compile(r"\d|\D+")
_BYTE = re.compile("<0x[0-9A-F]{2}>")

Merge = tuple[str, str]


class Extension:
    """The new tokens of the tokenizer at ``path``: ``merges`` in their order, and the tokens that they make.

    Raises :class:`TokenizerError` if it is not a BPE tokenizer that ``tokenizers`` can run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.tokenizer = load_tokenizer(path)
        self.backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self.described = json.loads(self.backend.to_str())
        model = self.described["model"]
        if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
            raise TokenizerError(
                f"{path}: its model is {model['type']}, and only BPE can be extended (Llama, Mistral, Qwen, GPT-2 and "
                "most others); use such a tokenizer"
            )
        self.has_bytes = "ByteLevel" in json.dumps(self.described["pre_tokenizer"])  # else it is like sentencepiece's
        self.known = set(self.tokenizer.get_vocab())
        joined = re.compile(rf"[Ġ{SPACE}]\d+|\d\d+")  # if no token is, the tokenizer means digits to stay single
        self.joins_digits = any(map(joined.fullmatch, self.known))
        self.merges: list[Merge] = []
        self.tokens: list[str] = []

    def learn(self, texts: Iterable[str], count: int) -> None:
        """Adds ``count`` tokens that save the most in the texts; raises :class:`TokenizerError` if they have fewer."""
        words = Counter(word for text in texts for word in self._words(text))
        for merge in most_frequent_merges({word: (self._parts(word), n) for word, n in words.items()}, self.known):
            self._add(merge)
            if len(self.tokens) == count:
                return
        raise TokenizerError(
            f"--pieces={count}: this text has only {len(self.tokens)} pieces that occur twice and that the tokenizer "
            f"lacks; give more text, or --pieces={len(self.tokens)} at most"
        )

    def add(self, pieces: Sequence[str]) -> None:
        """Adds tokens for these pieces of text, and for the parts that they are built from.

        Raises :class:`TokenizerError` for pieces that cannot be tokens.
        """
        for piece in pieces:
            words = self._words(piece) if self.has_bytes else [piece.replace(" ", SPACE)]
            parts = self._merged(self._parts(words[0])) if len(words) == 1 else [""]
            if not all(parts):
                raise TokenizerError(
                    f"the piece {piece!r} cannot be a token: the tokenizer splits it into words, or lacks its "
                    "characters; give one word, or a word with the space before it"
                )
            for part in parts[1:]:
                self._add((parts[0], part))
                parts[0] += part

    def save(self, out: Path, texts: Sequence[str]) -> tuple[float, float]:
        """Writes the extended tokenizer, and returns its UTF-8 bytes per token of the texts, before and after.

        The folder has a ``tokenizer.json`` and no sentencepiece model. Raises :class:`TokenizerError` if it does not
        decode to what the old one decodes to.
        """
        model = self.described["model"]
        first = vocabulary_size(self.tokenizer)
        for token in self.described["added_tokens"]:  # else their ids would move to the end of a longer vocabulary
            model["vocab"].setdefault(token["content"], token["id"])
        added = {token: first + number for number, token in enumerate(self.tokens)}
        model["vocab"] |= added
        model["merges"] += [list(merge) for merge in self.merges]
        save_tokenizer(self.tokenizer, out)
        (out / MODEL_FILE).unlink(missing_ok=True)
        (out / DESCRIPTION).write_text(json.dumps(self.described, ensure_ascii=False), encoding="utf-8")
        extended = load_tokenizer(out)
        before, after = [encode(each, [*HARD_TEXTS, *texts]) for each in (self.tokenizer, extended)]
        decoded = zip(map(self.tokenizer.decode, before), map(extended.decode, after), strict=True)
        if extended.get_vocab() != {**self.tokenizer.get_vocab(), **added} or any(old != new for old, new in decoded):
            raise TokenizerError(f"{self.path}: extended, it is not exact; update tokenizers and transformers")
        size = sum(len(text.encode()) for text in texts)
        counts = [sum(map(len, ids[len(HARD_TEXTS) :])) for ids in (before, after)]
        return size / max(1, counts[0]), size / max(1, counts[1])

    def _add(self, merge: Merge) -> None:
        token = "".join(merge)
        self.merges.append(merge)
        if token not in self.known:
            self.known.add(token)
            self.tokens.append(token)

    def _words(self, text: str) -> list[str]:
        """What the tokenizer looks for tokens in, one by one."""
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        words = [text]
        if self.backend.pre_tokenizer is not None:
            words = [word for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
        if self.has_bytes and self.joins_digits:
            return words
        return [part for word in words for part in (_DIGITS if self.has_bytes else _WORD).findall(word)]

    def _parts(self, word: str) -> list[str]:
        """The old tokens of a word; those that nothing can be joined to are empty."""
        unknown = self.described["model"]["unk_token"]
        tokens = (token.value for token in self.backend.model.tokenize(word))
        return ["" if token == unknown or _BYTE.fullmatch(token) else token for token in tokens]

    def _merged(self, parts: list[str]) -> list[str]:
        """The old tokens of a word after the new merges."""
        ranks = {merge: rank for rank, merge in enumerate(self.merges)}
        while found := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            parts = _join(parts, min(found, key=ranks.__getitem__))
        return parts


def most_frequent_merges(words: Mapping[str, tuple[list[str], int]], known: Iterable[str]) -> Iterable[Merge]:
    """Continues BPE's training on words, given as their tokens and how often they occur.

    Yields each time the pair that occurs most often, at least twice, then joins it. A pair whose token is ``known``
    already is left out: the tokenizer's merges do not make it.
    """
    known = set(known)
    parts = [list(tokens) for tokens, _ in words.values()]
    counts = [count for _, count in words.values()]
    total: Counter[Merge] = Counter()
    places: defaultdict[Merge, set[int]] = defaultdict(set)

    def count(index: int, sign: int) -> list[Merge]:
        pairs = [pair for pair in itertools.pairwise(parts[index]) if all(pair)]
        for pair in pairs:
            total[pair] += sign * counts[index]
            places[pair].add(index)
        return pairs

    for index in range(len(parts)):
        count(index, 1)
    queue = [(-number, pair) for pair, number in total.items()]
    heapq.heapify(queue)
    while queue:
        number, pair = heapq.heappop(queue)
        # what was counted since has an entry of its own
        if -number != total[pair] or total[pair] < 2 or "".join(pair) in known:
            continue
        yield pair
        known.add("".join(pair))
        changed: set[Merge] = set()
        for index in places.pop(pair):
            changed.update(count(index, -1))
            parts[index] = _join(parts[index], pair)
            changed.update(count(index, 1))
        for other in changed:
            heapq.heappush(queue, (-total[other], other))


def _join(parts: list[str], pair: Merge) -> list[str]:
    joined: list[str] = []
    index = 0
    while index < len(parts):
        both = tuple(parts[index : index + 2]) == pair
        joined.append("".join(pair) if both else parts[index])
        index += 2 if both else 1
    return joined
