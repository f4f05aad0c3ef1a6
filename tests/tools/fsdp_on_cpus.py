"""accelerate with FSDP on CPUs, which it only knows on GPUs."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Inside, an FSDP plugin is used on CPUs as well. Afterwards accelerate has no state, and no variables are left."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def with_fsdp(state: Any, *given: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        init(state, *given, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = fsdp_plugin

    with mock.patch.dict(os.environ), mock.patch.object(AcceleratorState, "__init__", with_fsdp):
        yield
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()
