"""What a step trains on: token blocks as inputs and shifted labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from relora_mora.data.lane_states import LaneStates

if TYPE_CHECKING:
    import torch

UNSCORED = -100  # cross entropy's ignore_index


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: ``n = batch_size / world_size`` sequences, ordered by lane.

    ``labels`` are already shifted: ``labels[i, j]`` is the token after ``input_ids[i, j]``, or ``UNSCORED``.
    ``document_ids`` number the documents inside each sequence. ``state`` says where this rank's lanes are after this
    batch.
    """

    input_ids: torch.Tensor  # int64 [n, T]
    labels: torch.Tensor  # int64 [n, T]
    document_ids: torch.Tensor | None  # int32 [n, T], where attention stays within a document
    state: LaneStates
    counts: dict[str, int]  # see counts_of; and retries, of its workers and this process since the stream was built
    notes: list[str]  # skipped lines met on the way, a few per shard: for the log


def document_ids(input_ids: npt.NDArray[Any], eos: int) -> npt.NDArray[np.int32]:
    """int32 [..., T]: the number of EOS up to and including each token of ``input_ids`` [..., T].

    An EOS belongs to the document after it, as that document's first input, just as at the start of a text that is
    scored alone. What predicts a document's first token then sees nothing of the document before.
    """
    return np.cumsum(input_ids == eos, axis=-1, dtype=np.int32)


def document_boundaries(ids: torch.Tensor) -> torch.Tensor:
    """Document ids [B, T], on the CPU -> int32 [P + 1]: where each document begins among all N = B T tokens, then N.

    The first token of a sequence begins a document.
    """
    import torch

    numbers = ids.numpy()
    begins = np.ones(numbers.shape, np.bool_)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return torch.from_numpy(np.append(np.flatnonzero(begins), numbers.size).astype(np.int32))
