"""The modules and classes of DeepSpeed beyond its documentation that this room uses.

They may move in any release, which is why the version of DeepSpeed is bounded. If one is missing, a run ends with
:class:`DeepSpeedChanged` when it starts.
"""

import contextlib
from collections.abc import Iterator
from importlib import metadata

import deepspeed


class DeepSpeedChanged(ValueError):
    """The installed DeepSpeed lacks something that this version of the package needs."""

    same_on_host = True  # all ranks of a host import the same DeepSpeed

    def __init__(self, lacks: str) -> None:
        with contextlib.suppress(metadata.PackageNotFoundError):
            requirements = metadata.requires("relora_mora") or []
            allowed = next(filter(lambda line: line.startswith("deepspeed"), requirements), "deepspeed")
            lacks += f"; install a version that the package was tested with: pip install '{allowed}'"
        super().__init__(f"DeepSpeed {deepspeed.__version__} has changed: {lacks}")


@contextlib.contextmanager
def deepspeed_imports() -> Iterator[None]:
    """Raises :class:`DeepSpeedChanged` if a module of DeepSpeed, or a name in it, cannot be imported."""
    try:
        yield
    except ImportError as error:
        if not str(error.name).startswith("deepspeed."):
            raise
        raise DeepSpeedChanged(str(error)) from error


with deepspeed_imports():
    from deepspeed.accelerator import cuda_accelerator
    from deepspeed.runtime import compiler
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
