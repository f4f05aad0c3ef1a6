"""Which tests show that a combination works, as docs/support.md names them.

A test is listed with a function from its parameters to the combinations that it trains. The parameters are read from
the decorators of the test itself, so a case that is removed there is no longer claimed here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest

from tests.support.settings import DIMENSIONS, USUAL, Combination
from tests.tools.adapter_tools import METHODS as ADAPTERS

# what plain `make test` leaves out, by marker or by file
TARGETS = {
    "elastic": "make test-elastic",
    "stops": "make test-stops",
    "kills": "make test-kill",
    "cluster": "make test-cluster",
    "tests/containers/image.py": "make test-image",
}
STAGES = tuple(DIMENSIONS["ZeRO stage"])
ONLY_OF_RUNS = ("data", "start")


class Evidence(NamedTuple):
    """A test, and what its cases combine; a case may stand for several combinations."""

    test: str
    combines: Callable[..., Combination | list[Combination]]


class Shown(NamedTuple):
    """A combination, the test that has it, and how that case is run."""

    combination: Combination
    test: str
    target: str


def trains(method: str, stage: int | str, precision: str | bool, **others: str) -> Combination:
    """Steps of an engine. ``precision`` may say whether it is bf16."""
    names = {"method": method, "ZeRO stage": str(stage), "precision": precision if isinstance(precision, str) else ""}
    names["precision"] = names["precision"] or ("bf16" if precision else "fp32")
    return {name: value for name, value in USUAL.items() if name not in ONLY_OF_RUNS} | names | others


def runs(method: str, stage: int | str, precision: str | bool, **others: str) -> Combination:
    """A run of the trainer, from its settings to its last checkpoint."""
    return USUAL | trains(method, stage, precision, **others)


def _operators(method: Mapping[str, Any]) -> dict[str, str]:
    return {"operators": "6, 1"} if method.get("operators") == [6] else {}


def _from_full_rank(
    stage: int, precision: str, sections: Mapping[str, Mapping[str, str]], stops: Sequence[int]
) -> Combination:
    method, optim = (sections.get(section, {}) for section in ("method", "optim"))
    others = {"optimizer": _optimizer(optim.get("matrices", "adamw")), "base": method.get("base", "null")}
    return runs(method.get("name", "remora"), stage, precision, start="full rank", **others)


def _optimizer(matrices: str) -> str:
    """The value of that dimension; the examples are rules of one's own."""
    return matrices if matrices in DIMENSIONS["optimizer"] else "FILE.py:NAME"


def _on_all_stages(**others: Any) -> list[Combination]:
    return [trains(stage=stage, **others) for stage in STAGES]


def _golden(method: str, way: str, precision: str) -> list[Combination]:
    """The run of a case, and the reference that it is compared with."""
    if way == "checkpointing":
        return [runs(method, 1, precision, checkpointing="yes")]
    if method == "full":
        return [runs(method, 1, precision)]
    forms = ("resident" if way == "resident" else "merged", "decoupled")
    return [runs(method, 1, precision, form=form) for form in forms]


def _tuned(method: str, stage: int, precision: str, operators: list[int] | None = None) -> Combination:
    dropout = {} if method == "full" else {"dropout": "0.1"}
    return runs(method, stage, precision, **dropout, start="a model", **_operators({"operators": operators}))


def _kind(kind: str) -> Combination:
    _, stage, precision, method, base = importlib.import_module("tests.train.test_finetuning").KINDS[kind]
    return _tuned(method, stage, precision) | {"base": base or "null"}


def _started(name: str, stage: int, **_: Any) -> Combination:
    """The first values of a run, which makes no step."""
    method = ADAPTERS[name.removesuffix("_with_modules")]
    begins = {"method": method["name"], "ZeRO stage": str(stage), "start": "a model and its adapter"}
    return begins | _operators(method)


def _base(method: Mapping[str, Any]) -> dict[str, str]:
    """The name, base and form of a method's settings."""
    stored = "" if method.get("base_products", True) else ", only stored"
    return {
        "method": method.get("name", "remora"),
        "base": f"{method['base']}{stored}",
        "form": method.get("form", "auto"),
    }


_RESETS = tuple(DIMENSIONS["reset"])
TRAINING = [
    Evidence(
        "tests/engine/test_stages.py::test_stages_agree_around_a_merge",
        lambda **_: _on_all_stages(method="remora", precision="fp32"),
    ),
    Evidence(
        "tests/engine/test_stages.py::test_stages_agree_in_bf16",
        lambda **_: _on_all_stages(method="remora", precision="bf16"),
    ),
    Evidence(
        "tests/engine/test_resets.py::test_a_merge_changes_only_what_it_should",
        lambda method, stage, bf16, **_: trains(method, stage, bf16),
    ),
    Evidence(
        "tests/engine/test_resets.py::test_reset_modes",
        lambda mode, matrices: trains("remora", 2, "fp32", reset=mode, optimizer=matrices),
    ),
    Evidence(
        "tests/engine/test_resets.py::test_carry_moves_the_state_to_the_new_operators",
        lambda stage, matrices: trains("remora", stage, "fp32", reset="carry", operators="7", optimizer=matrices),
    ),
    Evidence(
        "tests/engine/test_resets.py::test_the_first_step_after_any_reset_moves_no_element_by_more_than_twice_the_rate",
        lambda method, stage: [
            trains(method, stage, "fp32", reset=reset) for reset in _RESETS if method == "remora" or reset != "carry"
        ],
    ),
    Evidence(
        "tests/engine/test_resets.py::test_the_base_is_exact_after_a_hundred_merges",
        lambda bf16, base: {  # merges only
            "method": "remora",
            "operators": "1, 2, 3, 4",
            "reset": "full",
            "base": base or "null",
        },
    ),
    Evidence(
        "tests/engine/test_base.py::test_stored_weights_are_the_rounded_masters",
        lambda stage, bf16, method, **_: trains(stage=stage, precision=bf16, **_base(method)),
    ),
    Evidence(
        "tests/train/state/test_base_run.py::test_resumes_are_bit_equal",
        lambda stage, method, **_: runs(stage=stage, precision="bf16", **_base(method)),
    ),
    Evidence(
        "tests/engine/test_resident.py::test_resident_layers_train_like_the_merged_form_and_build_once_a_step",
        lambda stage, bf16, method, **_: [
            trains(method["name"], stage, bf16, form=form, **_operators(method)) for form in ("merged", "resident")
        ],
    ),
    Evidence(
        "tests/engine/test_matrices.py::test_every_stage_trains_as_plain_torch_does",
        lambda method, stage, **_: trains(method, stage, "fp32", optimizer="muon"),
    ),
    Evidence(
        "tests/engine/test_matrices.py::test_in_bf16_every_stage_trains_as_plain_torch_does_up_to_rounding",
        lambda stage: trains("remora", stage, "bf16", optimizer="muon"),
    ),
    Evidence(
        "tests/engine/test_rules.py::test_every_stage_trains_as_plain_torch_does",
        lambda method, stage, matrices, others, **_: trains(
            method, stage, "fp32", optimizer=_optimizer(matrices), embeddings=others
        ),
    ),
    Evidence(
        "tests/engine/test_rules.py::test_eight_bits_train_on_every_stage_as_in_plain_torch",
        lambda method, stage, matrices, others, **_: trains(
            method, stage, "fp32", optimizer=_optimizer(matrices), embeddings=others
        ),
    ),
    Evidence(
        "tests/engine/test_rules.py::test_a_merge_drops_the_states_of_adapters_or_keeps_them",
        lambda mode, matrices: trains("remora", 2, "fp32", optimizer=_optimizer(matrices), reset=mode),
    ),
    Evidence(
        "tests/sizing/test_measured_memory.py::test_state_and_gradients",
        lambda method, stage, bf16, matrices, others, **_: trains(
            method.partition(" ")[0],
            stage,
            bf16,
            optimizer=_optimizer(matrices),
            embeddings=others,
            base=method.partition(" ")[2] or "null",
        ),
    ),
    Evidence(
        "tests/checkpoint/test_elastic.py::test_a_moved_run_continues_as_if_it_had_not_moved",
        lambda move, **_: [runs(move.method, stage, "fp32") for stage in (move.stage, move.to_stage)],
    ),
    Evidence(
        "tests/checkpoint/test_elastic.py::test_every_move",
        lambda move, **_: [runs(move.method, stage, "fp32") for stage in (move.stage, move.to_stage)],
    ),
    Evidence(
        "tests/train/state/test_resume.py::test_a_resume_before_at_and_after_a_merge_is_bit_equal",
        lambda stage, bf16, stops: runs("remora", stage, bf16),
    ),
    Evidence(
        "tests/train/test_full_steps.py::test_a_resume_before_at_and_after_the_switch_is_bit_equal", _from_full_rank
    ),
    Evidence(
        "tests/train/test_full_steps.py::test_losses_equal_a_reference_that_keeps_the_moments_of_everything_else",
        lambda method: runs(method, 2, "fp32", start="full rank"),
    ),
    Evidence(
        "tests/train/state/test_resume.py::test_every_method_resumes_bit_equal",
        lambda method: runs(method, 2, "bf16"),
    ),
    Evidence(
        "tests/train/state/test_resume.py::test_resident_layers_equal_the_merged_form_bit_for_bit_after_a_resume",
        lambda method, stage, form: [runs(method, stage, "bf16", form=each) for each in ("merged", form)],
    ),
    Evidence(
        "tests/train/test_trainer.py::test_every_method_learns_and_documents_its_run",
        lambda method: runs(method, 2, "fp32"),
    ),
    Evidence(
        "tests/train/test_trainer.py::test_activation_checkpointing_does_not_change_the_result",
        lambda stage: [runs("remora", stage, "fp32", checkpointing=each) for each in ("no", "yes")],
    ),
    Evidence(
        "tests/train/test_trainer.py::test_documents_can_be_kept_apart",
        lambda: [runs("remora", 2, "fp32", data=each) for each in ("text", "text, masked")],
    ),
    Evidence("tests/train/test_golden_loss.py::test_losses_equal_the_reference", _golden),
    Evidence(
        "tests/train/test_golden_loss.py::test_weights_in_8_bits_train_nearly_as_the_reference",
        lambda base, form, precision: runs("remora", 1, precision, base=base, form=form),
    ),
    Evidence(
        "tests/train/test_golden_loss.py::test_compiled_layers_train_as_the_reference",
        lambda method, stage: runs(method, stage, "fp32", compile="yes"),
    ),
    Evidence(
        "tests/train/test_finetuning.py::test_every_method_is_tuned_on_every_stage",
        lambda method, stage: _tuned(method, stage, "bf16", [6] if method == "mora" else None),
    ),
    Evidence("tests/train/test_finetuning.py::test_every_kind_of_model_trains_merges_resumes_and_is_exported", _kind),
    Evidence("tests/weights/test_start_adapter.py::test_a_run_begins_with_the_values_in_the_file", _started),
    Evidence(
        "tests/train/test_muon_run.py::test_a_resume_is_bit_equal",
        lambda method, stage, bf16: runs(
            method, stage, bf16, optimizer="muon", **({"reset": "random"} if method.startswith("re") else {})
        ),
    ),
    Evidence(
        "tests/train/test_rule_run.py::test_a_resume_is_bit_equal",
        lambda method, stage, bf16, matrices, others, **_: runs(
            method, stage, bf16, optimizer=_optimizer(matrices), embeddings=others
        ),
    ),
    Evidence(
        "tests/train/test_sltrain_run.py::test_a_resume_is_bit_equal",
        lambda stage, matrices: runs("sltrain", stage, "fp32", optimizer=matrices),
    ),
    Evidence(
        "tests/train/test_sltrain_run.py::test_every_stage_trains_the_same",
        lambda: [runs("sltrain", stage, "fp32", optimizer="muon") for stage in STAGES],
    ),
    Evidence(
        "tests/train/test_sltrain_run.py::test_after_a_start_at_full_rank_it_adds_to_the_trained_weights",
        lambda: runs("sltrain", 3, "fp32", start="full rank"),
    ),
    Evidence(
        "tests/train/test_sltrain_run.py::test_on_a_trained_model_it_begins_with_that_model",
        lambda: runs("sltrain", 2, "fp32", start="a model"),
    ),
    Evidence(
        "tests/train/test_drawn_operator.py::test_a_resume_is_bit_equal",
        lambda **_: runs("remora", 2, "fp32", operators="7"),
    ),
    Evidence(
        "tests/train/test_drawn_operator.py::test_without_merges_it_is_drawn_once_and_from_the_seed",
        lambda: runs("mora", 2, "fp32", operators="7"),
    ),
    Evidence(
        "tests/train/test_drawn_operator.py::test_all_programs_are_made_before_the_first_step",
        lambda: runs("remora", 2, "fp32", operators="7", compile="yes"),
    ),
    Evidence(
        "tests/train/test_records_run.py::test_an_interrupted_run_continues_bit_for_bit",
        lambda: runs("remora", 2, "fp32", data="records, whole"),
    ),
    Evidence(
        "tests/train/test_records_run.py::test_epochs_of_records_are_counted",
        lambda: runs("remora", 2, "fp32", data="records, one each"),
    ),
    Evidence(
        "tests/train/test_records_run.py::test_steps_inside_a_prompt_report_no_loss",
        lambda: runs("remora", 2, "fp32", data="records, stream"),
    ),
    Evidence(
        "tests/train/test_generated_answers.py::test_generation_does_not_affect_training",
        lambda stage: runs("mora", stage, "fp32", data="records, one each"),
    ),
    Evidence(
        "tests/adapters/test_every_adapter.py::test_every_form_adds_the_delta_that_a_merge_adds",
        lambda name: [{"method": name, "form": form} for form in DIMENSIONS["form"] if form != "auto"],
    ),
    Evidence(
        "tests/model/test_llama.py::test_hidden_states_equal_transformers_and_no_value_is_read_back",
        lambda attention: {"attention": attention, "precision": "fp32"},
    ),
]


def _cases(function: Any, marks: list[Any]) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """The parameters of each case of a test, and the names of the markers that decide whether it is run."""
    axes: list[list[tuple[dict[str, Any], set[str]]]] = []
    for mark in marks:
        if mark.name == "parametrize":
            names, values = mark.args
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            axis = []
            for value in values:
                given, own = (value.values, value.marks) if isinstance(value, _PARAMETERS) else (value, ())
                alone = len(names) == 1 and not isinstance(value, _PARAMETERS)
                axis.append((dict(zip(names, [given] if alone else given, strict=True)), {m.name for m in own}))
            axes.append(axis)
    markers = {mark.name for mark in marks}
    for case in itertools.product(*axes):
        parameters = {name: value for part, _ in case for name, value in part.items()}
        yield parameters, markers.union(*(own for _, own in case))


_PARAMETERS = type(pytest.param())


@functools.cache
def cases(test: str) -> list[tuple[dict[str, Any], str]]:
    """The parameters of each case of a test, with the command that runs it.

    Raises AttributeError or ModuleNotFoundError if there is no such test.
    """
    path, _, function_name = test.partition("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    function = getattr(module, function_name)
    of_module = getattr(module, "pytestmark", [])
    marks = [*(of_module if isinstance(of_module, list) else [of_module]), *getattr(function, "pytestmark", [])]
    found = []
    for parameters, markers in _cases(function, marks):
        assert parameters.keys() <= inspect.signature(function).parameters.keys() | {"course"}, test
        targets = [target for name, target in TARGETS.items() if name in {*markers, path}]
        found.append((parameters, targets[0] if targets else "make test"))
    return found


def shown(evidence: list[Evidence]) -> list[Shown]:
    """All combinations that tests show, each once for a test and a way to run it."""
    found = []
    for test, combines in evidence:
        for parameters, target in cases(test):
            combined = combines(**parameters)
            for combination in combined if isinstance(combined, list) else [combined]:
                found.append(Shown(combination, test, target))
    return found
