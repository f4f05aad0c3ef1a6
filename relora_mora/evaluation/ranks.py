"""How ranks share an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
