"""What docs/support.md combines besides settings: exports, the library, and ways to start a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args, get_type_hints
from unittest import mock

import pytest
import torch
from torch import nn

import relora_mora as rm
from relora_mora.adapters import stored
from relora_mora.adapters.inject import layer_class
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.commands.export import main as export_command
from relora_mora.config.load import ConfigError
from relora_mora.config.registry import METHODS
from relora_mora.config.schema import MethodConfig, ModelConfig
from relora_mora.model import llama
from relora_mora.operators import Draw
from relora_mora.train.begin import start_adapter
from relora_mora.weights import export
from tests.support.evidence import Evidence
from tests.support.settings import DIMENSIONS, Combination
from tests.tools.adapter_tools import METHODS as ADAPTERS

# what a checkpoint holds, with its method and how many merges it has made; those of adapters have no merge
_PLAIN = {name: method for name, method in ADAPTERS.items() if not name.endswith("_pattern")}
TRAINED: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({"name": "full"}, 0),
    **{name: (method, 0) for name, method in _PLAIN.items()},
    "relora": ({"name": "relora"}, 1),
    "remora": ({"name": "remora"}, 1),
    "sltrain": ({"name": "sltrain"}, 0),
}


def _layer(method: MethodConfig) -> AdapterLinear:
    linear = nn.Linear(16, 16, bias=False)
    return layer_class(method).from_settings(linear, method, torch.Generator(), None, Draw())


def export_refusal(combination: Combination) -> str | None:
    """The message with which ``relora-mora export --format=FORM`` refuses a checkpoint."""
    trained, form = combination["checkpoint of"], combination["format"]
    if form == "merged":
        return None  # every checkpoint has it
    settings, merges = TRAINED[trained]
    method = MethodConfig(**settings)
    operator = next(iter(method.cycle), None)
    manifest = SimpleNamespace(merges_done=merges, parameters={}, model_config={}, operator=operator)
    reader: Any = SimpleNamespace(folder="CHECKPOINT", manifest=manifest)
    with mock.patch.object(export, "other_weights", lambda *_: {}):
        try:
            export._check_exportable(reader, ModelConfig(init_from="a-model"), method, released=form == "peft-mora")
            if form == "peft":
                layer = _layer(method)
                export._as_lora(reader, method, layer, [layer.get_parameter(key) for key in layer.adapter_names])
        except CheckpointError as error:
            return str(error).partition(": ")[2]
    return None


# a folder for model.adapter, with the operator that it was trained with
FOLDERS = {"LoRA": None, "MoRA, operator 1": 1, "MoRA, operator 6": 6}


def adapter_refusal(combination: Combination) -> str | None:
    """The message with which a run refuses to begin with an adapter."""
    operator = FOLDERS[combination["model.adapter"]]
    method = MethodConfig(
        name=combination["method"], operators=[operator or 1, 2], square_multiple=2 if operator == 6 else 1
    )
    layers = {f"model.layers.0.{name}": 4 for name in method.target_modules}
    adapter: Any = SimpleNamespace(mora_type=operator, layers=layers)
    return next(start_adapter._method_faults(adapter, method), None)


ADAPTERS_TO_BEGIN_WITH = [
    Evidence(
        "tests/weights/test_start_adapter.py::test_a_run_begins_with_the_values_in_the_file",
        lambda name, **_: {
            "model.adapter": {"mora1": "MoRA, operator 1", "mora6": "MoRA, operator 6"}.get(name, "LoRA"),
            "method": ADAPTERS[name.removesuffix("_with_modules")]["name"],
        },
    )
]

EXPORTS = [
    Evidence(
        "tests/train/test_trainer.py::test_the_export_is_the_model_that_was_trained",
        lambda method: {"checkpoint of": method, "format": "merged"} if method in TRAINED else [],
    ),
    Evidence(
        "tests/weights/test_peft.py::test_peft_computes_what_the_run_does",
        lambda name, **_: [{"checkpoint of": name, "format": form} for form in ("merged", "peft") if name in TRAINED],
    ),
    Evidence(
        "tests/weights/test_peft.py::test_the_released_mora_finds_our_matrices",
        lambda name: {"checkpoint of": name, "format": "peft-mora"} if name in TRAINED else [],
    ),
]

KINDS = {
    "plain": "one process",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero0": "DeepSpeed, ZeRO 0",
    "zero1": "DeepSpeed, ZeRO 1",
    "zero2": "DeepSpeed, ZeRO 2",
    "zero3": "DeepSpeed, ZeRO 3",
}
TRAINED_BY = {"a loop": KINDS, "Trainer": {kind: f"Trainer, {name}" for kind, name in KINDS.items()}}
_MERGING = {"relora": rm.ReLoRA, "remora": rm.ReMoRA}
ADAPTED = tuple(name for name, method in METHODS.items() if method.adapter is not None)
ATTACHED = tuple(name for name in ADAPTED if hasattr(rm, METHODS[name].title))


def _attached(by: str, kind: str, method: str = "remora", **others: str) -> Combination:
    return {"trained by": TRAINED_BY[by][kind], "method": method, **others}


def _reset(method: Any, reset: str) -> Combination:
    return _attached("a loop", "plain", method().name, reset=reset)


def reset_refusal(combination: Combination) -> str | None:
    """The message with which the library refuses a reset of a method."""
    try:
        _MERGING[combination["method"]](reset=combination["reset"])  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return None


LIBRARY = [
    Evidence(
        "tests/library/test_models.py::test_a_model_trains_merges_and_becomes_plain",
        lambda name, **_: _attached("a loop", "plain", name),
    ),
    Evidence("tests/library/test_models.py::test_every_reset", _reset),
    Evidence(
        "tests/library/test_against_pretrain.py::test_a_loop_trains_bit_for_bit_as_pretrain",
        lambda method: _attached("a loop", "plain", method),
    ),
    Evidence(
        "tests/library/test_ranks.py::test_ranks_train_as_one_process",
        lambda kind, reset: _attached("a loop", kind, reset=reset),
    ),
    Evidence(
        "tests/library/test_huggingface.py::test_a_resume_is_bit_equal_before_and_after_a_merge",
        lambda **_: _attached("Trainer", "plain"),
    ),
    Evidence(
        "tests/library/test_huggingface.py::test_ranks_of_a_trainer_resume_exactly",
        lambda kind: _attached("Trainer", kind),
    ),
    Evidence(
        "tests/library/test_examples.py::test_accelerate_fsdp2",
        lambda: {"trained by": "accelerate, FSDP2", "method": "remora"},
    ),
]

STARTED_BY = (
    "deepspeed",
    "torchrun",
    "deepspeed, two hosts",
    "torchrun, two hosts",
    "Slurm",
    "ranks.sh of a Kubernetes pod",
    "the container image",
)
EVENTS = ("trains", "saves and stops on a signal", "ends if a rank is lost")


def _starts(by: str, *events: int) -> list[Combination]:
    return [{"started by": by, "what it does": EVENTS[event]} for event in events]


STARTS = [
    Evidence(
        "tests/supervise/test_stops.py::test_a_signal_saves_and_ends_all_ranks",
        lambda launcher, **_: _starts(launcher, 0, 1),
    ),
    Evidence(
        "tests/supervise/test_stops.py::test_a_lost_rank_ends_the_job_and_is_named", lambda **_: _starts("deepspeed", 2)
    ),
    Evidence(
        "tests/cluster/test_launchers.py::test_deepspeed_trains_across_both_hosts",
        lambda **_: _starts("deepspeed, two hosts", 0),
    ),
    Evidence(
        "tests/cluster/test_lost_host.py::test_a_cut_link_ends_the_job_on_both_hosts_and_one_host_continues",
        lambda: _starts("deepspeed, two hosts", 0, 2),
    ),
    Evidence(
        "tests/cluster/test_launchers.py::test_torchrun_trains_across_both_hosts",
        lambda: _starts("torchrun, two hosts", 0),
    ),
    Evidence("tests/cluster/test_slurm.py::test_a_job_finishes_with_a_log_per_rank", lambda: _starts("Slurm", 0)),
    Evidence(
        "tests/cluster/test_slurm.py::test_a_preempted_job_continues_and_ends_bit_equal", lambda: _starts("Slurm", 1)
    ),
    Evidence(
        "tests/cluster/test_slurm.py::test_a_job_that_lost_a_node_continues_when_the_node_is_back",
        lambda **_: _starts("Slurm", 2),
    ),
    Evidence(
        "tests/containers/test_kubernetes.py::test_a_drained_pod_saves_and_the_same_pods_finish_the_run",
        lambda: _starts("ranks.sh of a Kubernetes pod", 0, 1),
    ),
    Evidence(
        "tests/containers/image.py::test_it_trains_as_its_user_and_the_health_check_passes",
        lambda: _starts("the container image", 0),
    ),
]


class Table(NamedTuple):
    """Cells are combinations of a row's value and a column's."""

    title: str
    row: str
    rows: Iterable[str]
    column: str
    columns: Iterable[str]
    evidence: list[Evidence]
    refusal: Callable[[Combination], str | None] = lambda combination: None


_FORMATS = get_args(get_type_hints(export_command)["format"])
_LOOPS = [name for kinds in TRAINED_BY.values() for name in kinds.values()]
TABLES = (
    Table(
        "Initial adapters and methods",
        "model.adapter",
        FOLDERS,
        "method",
        ADAPTED,
        ADAPTERS_TO_BEGIN_WITH,
        adapter_refusal,
    ),
    Table("Exports", "checkpoint of", TRAINED, "format", _FORMATS, EXPORTS, export_refusal),
    Table("The library and training loops", "trained by", [*_LOOPS, "accelerate, FSDP2"], "method", ATTACHED, LIBRARY),
    Table("The library and resets", "method", _MERGING, "reset", DIMENSIONS["reset"], LIBRARY, reset_refusal),
    Table("Ways to start a run", "started by", STARTED_BY, "what it does", EVENTS, STARTS),
)


def _refused_base(base: str, capability: tuple[int, int], name: str) -> str:
    """The message with which a GPU refuses ``method.base`` in float32."""
    gpu = mock.patch.multiple(torch.cuda, get_device_capability=lambda: capability, get_device_name=lambda: name)
    with gpu, pytest.raises(ConfigError) as refused:
        stored.check_device(MethodConfig(base=base, base_products=True), bf16=False, on_gpu=True)
    return refused.value.faults[0]


def other_refusals() -> dict[str, str]:
    """Refusals that depend on the machine, or on who trains."""
    with pytest.raises(ConfigError) as no_flash:
        llama.check_attention(ModelConfig(attention="flash_attention_2"), bf16=False)
    with mock.patch.object(llama, "missing_to_compile", lambda _: "..."), pytest.raises(ConfigError) as no_compiler:
        llama.compiles_here(ModelConfig(compile=True), 0, on_gpu=False)
    with pytest.raises(ValueError) as resident:
        rm.ReMoRA(form="resident")  # type: ignore[arg-type]
    return {
        "model.compile=true if something is missing (its name is in place of ...)": no_compiler.value.faults[0],
        "model.attention=flash_attention_2 without a GPU": no_flash.value.faults[0],
        "method.base=int8 on an old GPU": _refused_base("int8", (7, 5), "Tesla T4"),
        "method.base=fp8 with train.precision=fp32 on a GPU": _refused_base("fp8", (9, 0), "NVIDIA H100"),
        'form="resident" in the library': str(resident.value),
    }
