"""What this room uses of DeepSpeed beyond its documentation, in one list.

Such names may move in any release, which is why the version of DeepSpeed is bounded. If one is missing, a run ends with
:class:`DeepSpeedChanged` when it is built. ``tests/engine/test_internals.py`` compares the list with the code.
"""

import contextlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import deepspeed
import deepspeed.ops
from torch import nn


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
    from deepspeed.runtime import bf16_optimizer, compiler
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16 import unfused_optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

Uses = dict[str, str]  # an attribute, and what for

# attributes of modules and classes; objects get theirs when they are built
STATIC: dict[Any, Uses] = {
    deepspeed.ops: {"__compatible_ops__": "the shared-memory collective is switched off there"},
    cuda_accelerator: {"pynvml": "removed: it misreads CUDA_VISIBLE_DEVICES with MIG"},
    compiler: {"compile": "replaced while Muon is imported, because torch's compiler takes seconds"},
    zero_utils: {"ZERO_SUPPORTED_OPTIMIZERS": "our optimizers are added"},
    bf16_optimizer: {"get_global_norm_of_tensors": "called before a step, replaced during one"},
    unfused_optimizer: {"get_weight_norm": "replaced during a step"},
}
OBJECTS: dict[type, Uses] = {
    DeepSpeedEngine: {
        "optimizer": "DeepSpeed's optimizer, one of the classes below, or ours at stage 0 in fp32",
        "module": "its gradients, at stage 0 in fp32",
        "device": "the device of the parameters",
        "get_global_grad_norm": "the norm of the last step",
        "was_step_applied": "whether a user's step was not skipped",
    },
    FP16_UnfusedOptimizer: {
        "optimizer": "our optimizer",
        "overflow": "whether a user's step was skipped",
        "fp16_groups": "the parameters, by group",
        "fp32_groups": "their masters",
        "overflow_checker.check": "replaced during a step",
    },
    FP16_Optimizer: {
        "optimizer": "the user's optimizer",
        "overflow": "whether a user's step was skipped",
        "fp16_groups": "the parameters, by group",
        "fp16_groups_flat": "their storage",
        "fp32_groups_flat": "their masters",
    },
    BF16_Optimizer: {
        "optimizer": "our optimizer",
        "overflow": "whether a user's step was skipped",
        "bf16_groups": "the parameters, by group",
        "fp32_groups_flat_partition": "this rank's masters",
        "get_grads_for_norm": "the gradients to measure before a step",
        "update_lp_params": "sets the parameters from the masters",
    },
    DeepSpeedZeroOptimizer: {
        "optimizer": "our optimizer",
        "overflow": "whether a user's step was skipped",
        "round_robin_bit16_groups": "the parameters in the order of the flat masters",
        "round_robin_bit16_offsets": "where each begins",
        "single_partition_of_fp32_groups": "this rank's masters",
        "bit16_groups": "the number of groups",
        "averaged_gradients": "the gradients to measure before a step",
        "params_in_partition": "the parameters that they belong to",
        "get_grad_norm_direct": "measures them",
        "scaled_global_norm": "replaced during a step",
        "update_lp_params": "sets the parameters from the masters",
    },
    DeepSpeedZeroOptimizer_Stage3: {
        "optimizer": "our optimizer",
        "overflow": "whether a user's step was skipped",
        "fp16_groups": "the parameters of each subgroup",
        "fp32_partitioned_groups_flat": "this rank's masters",
        "fp16_partitioned_groups_flat": "this rank's slices of the parameters, set from the masters",
        "_unflatten_partitioned_parameters": "makes the parameters refer to these slices",
        "persistent_parameters": "small parameters, which stay whole and are gathered again",
        "_get_norm_groups": "called before a step, replaced during one",
    },
    nn.Parameter: {  # at stage 3
        "ds_id": "a parameter without it is not DeepSpeed's",
        "ds_shape": "the shape of the whole parameter",
        "partition_numel": "the elements of a slice",
        "partition": "frees small parameters before a change",
        "all_gather": "makes small parameters whole after a change",
    },
}


def check_objects(*objects: Any) -> None:
    """Raises :class:`DeepSpeedChanged` if objects of DeepSpeed, or its parameters, lack what this room uses of them."""
    _check({each: uses for each in objects for kind, uses in OBJECTS.items() if isinstance(each, kind)})


def _check(owners: Mapping[Any, Uses]) -> None:
    missing = [f"{_name(owner)}.{name}" for owner, uses in owners.items() for name in uses if not _has(owner, name)]
    if missing:
        raise DeepSpeedChanged(f"there is no {', '.join(missing)}")


def _has(owner: Any, path: str) -> bool:
    first, _, rest = path.partition(".")
    return hasattr(owner, first) and (not rest or _has(getattr(owner, first), rest))


def _name(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)


_check(STATIC)
