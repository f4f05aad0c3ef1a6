"""A DeepSpeed engine that somebody else has made, such as accelerate or a training loop of the user."""

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn

from relora_mora.engine.masters import stage_of
from relora_mora.engine.torch_state import moments_in, restart_counts, restart_state, whole_shapes
from relora_mora.engine.zero_state import ZeroState


class UserZero(ZeroState):
    """DeepSpeed's optimizer ``zero`` of ``lm``, with whichever torch optimizer is inside.

    Raises ValueError if the optimizer does not train all of ``names``, the parameters to merge and reset, or if it
    trains other parameters in the same groups.
    """

    def __init__(self, lm: nn.Module, zero: Any, names: Sequence[str]) -> None:
        super().__init__(lm, zero, whole_shapes(lm), stage_of(zero))
        held = self.elements_held(names)
        expected = sum(self.shapes[name].numel() for name in names)
        if held != expected:
            raise ValueError(
                f"DeepSpeed's optimizer trains {held:,} of {expected:,} adapter elements; "
                "call attach() before deepspeed.initialize(), and make the optimizer from parameter_groups()"
            )
        flats = {id(flat) for flat in self.flats(set(names))}
        mixed = [part.name for part in self.fragments if id(part.flat) in flats and part.name not in names]
        if mixed:
            raise ValueError(
                f"the optimizer has adapters and other parameters ({mixed[0]}, ...) in one group, and DeepSpeed keeps "
                "one step count per group, so a merge cannot reset the adapters' count; make the optimizer from "
                "parameter_groups()"
            )

    def moments_of(self, name: str) -> Sequence[str]:
        """See :class:`relora_mora.engine.protocol.Engine`; the same on all ranks, also on those that hold nothing."""
        flats = [part.flat for part in self.fragments_of.get(name, self.fragments)]
        return moments_in(self.state_of(flats[0]), flats[0].shape) if flats else []

    @torch.no_grad()
    def clear_state(self, names: Set[str]) -> None:
        """See :func:`restart_state`; also zeroes a step count that the optimizer keeps for a whole group."""
        flats = self.flats(names)
        for flat in flats:
            restart_state(self.optimizer, flat)
        cleared = {id(flat) for flat in flats}
        restart_counts(self.optimizer, cleared)
