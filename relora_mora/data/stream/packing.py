"""Packing of rows into blocks: as a stream without padding, or as whole rows next to each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relora_mora.data.lanes import LaneStates
from relora_mora.data.rows import Encoded, Scored

if TYPE_CHECKING:
    import torch

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
DocumentIds = npt.NDArray[np.int32]

UNSCORED = -100  # cross entropy's ignore_index
WINDOW_BLOCKS = 16  # whole rows are packed with others of a window of so many blocks; a larger one wastes less room


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: ``n = batch_size / world_size`` sequences, ordered by lane.

    ``labels`` are already shifted: ``labels[i, j]`` is the token after ``input_ids[i, j]``, or ``UNSCORED``.
    ``document_ids`` number the documents inside each sequence. ``state`` is the position of this rank's lanes after
    this batch.
    """

    input_ids: "torch.Tensor"  # int64 [n, T]
    labels: "torch.Tensor"  # int64 [n, T]
    document_ids: "torch.Tensor | None"  # int32 [n, T]; None unless attention stays within a document
    state: LaneStates
    counts: dict[str, int]  # see counts_of; plus the retries of reads
    notes: list[str]  # for the log: lines that were skipped, a few per shard


class Block(NamedTuple):
    """``scored[j]`` says whether the prediction of ``tokens[j + 1]`` counts in the loss.

    ``documents`` gives the document number of each input (all tokens but the last); 0 for all if attention may reach
    back to the beginning of the block.
    """

    tokens: Tokens  # [T + 1]
    scored: Mask  # [T]
    documents: DocumentIds  # [T]


def document_ids(input_ids: npt.NDArray[Any], eos: int) -> DocumentIds:
    """int32 [..., T]: the number of EOS up to and including each token of ``input_ids`` [..., T].

    An EOS belongs to the document after it and is that document's first input, as it is when a text is scored by
    itself. The prediction of a document's first token therefore does not depend on the document before.
    """
    return np.cumsum(input_ids == eos, axis=-1, dtype=np.int32)


def document_boundaries(ids: "torch.Tensor") -> "torch.Tensor":
    """Document ids [B, T], on the CPU -> int32 [P + 1]: the offset of each document in all N = B T tokens, then N.

    The first token of each sequence begins a document.
    """
    import torch

    numbers = ids.numpy()
    begins = np.ones(numbers.shape, np.bool_)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    boundaries = np.append(np.flatnonzero(begins), numbers.size)
    return torch.from_numpy(boundaries.astype(np.int32))


def with_end(scored: Scored) -> Mask:
    """The mask of a row and its EOS, which is scored if the token before it is, so the model learns to end answers."""
    mask = np.zeros(len(scored) + 1, np.bool_)
    mask[:-1] = scored
    mask[-1] = len(scored) > 0 and scored[-1]
    return mask


def block_of(rows: Sequence[Encoded], *, eos: int, sequence_length: int, fills: bool = True) -> Block:
    """Puts rows next to each other and pads with EOS, which are unscored and a document of their own.

    The first token of a row is not scored either, since there is no token before it. If each block has one row
    (``fills`` is false), all inputs are one document.
    """
    tokens = np.full(sequence_length + 1, eos, np.int32)
    scored = np.zeros(sequence_length + 1, np.bool_)
    documents = np.full(sequence_length + 1, len(rows), np.int32)
    begin = 0
    for number, row in enumerate(rows):
        end = begin + len(row.ids)
        tokens[begin:end] = row.ids
        scored[begin + 1 : end] = True if row.scored is None else row.scored[1:]
        documents[begin:end] = number
        begin = end
    return Block(tokens, scored[1:], documents[:-1] if fills else np.zeros(sequence_length, np.int32))


def packed(sizes: Sequence[int], sequence_length: int, *, fills: bool) -> Iterator[list[int]]:
    """The numbers of the rows in each block; a block has at most ``sequence_length + 1`` tokens."""
    if not fills:
        yield from ([number] for number in range(len(sizes)))
        return
    first = 0  # row of the window
    tokens = 0
    for number, size in enumerate(sizes):
        tokens += size
        if tokens >= WINDOW_BLOCKS * sequence_length or number == len(sizes) - 1:
            blocks = first_fit(sizes[first : number + 1], sequence_length + 1)
            yield from ([first + at for at in block] for block in blocks)
            first = number + 1
            tokens = 0


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of the rows in each block: from the largest row down, each goes into the first block with room."""
    blocks: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[number]
        at = next((at for at, free in enumerate(left) if free >= size), len(left))
        if at == len(left):
            blocks.append([])
            left.append(room)
        blocks[at].append(number)
        left[at] -= size
    return [sorted(numbers) for numbers in blocks]
