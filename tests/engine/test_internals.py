"""The list of what the engine uses of DeepSpeed beyond its documentation: true of DeepSpeed, and complete."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from relora_mora.engine import internals
from relora_mora.engine.protocol import Engine
from tests.tools.grids import STAGES
from tests.tools.helpers import ROOT

ROOMS = ("engine", "library", "checkpoint")  # which see objects of DeepSpeed
BY_NAME = ("getattr", "hasattr", "setattr", "replaced")  # functions that take the name of an attribute


@functools.cache
def _used() -> set[str]:
    """The names of all attributes that these rooms read, call or replace, unless they are of ``self``."""
    used: set[str] = set()
    for path in (path for room in ROOMS for path in (ROOT / "relora_mora" / room).glob("*.py")):
        if path.stem == internals.__name__.rpartition(".")[2]:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                used.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
                used |= {
                    each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
                }
    return used


def _listed() -> set[str]:
    """The names in the list that the code spells out."""
    paths = [path for uses in (*internals.STATIC.values(), *internals.OBJECTS.values()) for path in uses]
    return {name for path in paths for name in path.split(".")}


def names_of_objects(stage: int, bf16: bool) -> dict[str, set[str]]:
    """The attributes that DeepSpeed's objects have at a stage, by class; building the engine checks the list."""
    from tests.tools.tiny import build_rig, tiny_config

    engine = build_rig(tiny_config(1, train={"zero_stage": stage}), bf16=bf16).engine
    zero = engine.deepspeed.optimizer
    objects = [engine.deepspeed, zero] if stage or bf16 else [engine.deepspeed]
    if stage == 3:
        objects.append(next(engine.lm.parameters()))
    return {type(each).__name__: set(dir(each)) for each in objects}


def names_of_fused() -> dict[str, set[str]]:
    """Those of the optimizer in which DeepSpeed wraps its FusedAdam, which our own engine never has."""
    zero = internals.FP16_Optimizer(torch.optim.AdamW(nn.Linear(2, 2).parameters()), low_precision_dtype=torch.bfloat16)
    return {type(zero).__name__: set(dir(zero)) - {"deepspeed"}}  # which our engine has, too


@pytest.fixture(scope="module")
def of_deepspeed(pools: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for stage in STAGES:
        for bf16 in (False, True):
            found |= pools(1)(names_of_objects, stage, bf16)[0]
    return found | pools(1)(names_of_fused)[0]


@pytest.mark.more
@pytest.mark.distributed
def test_deepspeed_has_everything_in_the_list(of_deepspeed: dict[str, set[str]]) -> None:
    for kind, uses in internals.OBJECTS.items():
        lacking = [name for name in uses if name.partition(".")[0] not in of_deepspeed[kind.__name__]]
        assert not lacking, f"DeepSpeed's {kind.__name__} has no {', '.join(lacking)}"


@functools.cache
def _public() -> set[str]:
    """Names that torch and DeepSpeed document, and those of our engines."""
    linear = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(linear.parameters())
    owners = (linear, linear.weight, optimizer, torch.distributed, deepspeed.comm, deepspeed, Engine, {})
    return {name for owner in owners for name in dir(owner)}


def _unlisted(of_deepspeed: dict[str, set[str]], listed: set[str]) -> Iterator[str]:
    for name in sorted(_used() - listed - _public()):
        kinds = [kind for kind, names in of_deepspeed.items() if name in names]
        if kinds:
            yield f"{' or '.join(kinds)}.{name}"


@pytest.mark.distributed
def test_the_code_uses_nothing_that_is_not_in_the_list(of_deepspeed: dict[str, set[str]]) -> None:
    assert list(_unlisted(of_deepspeed, _listed())) == []


@pytest.mark.distributed
def test_a_name_that_is_removed_from_the_list_is_found(of_deepspeed: dict[str, set[str]]) -> None:
    own = {path.partition(".")[0] for uses in internals.OBJECTS.values() for path in uses}
    for name in own - _public():
        assert [each.rpartition(".")[2] for each in _unlisted(of_deepspeed, _listed() - {name})] == [name]


def test_the_code_uses_everything_in_the_list() -> None:
    assert _listed() - _used() == set()


@pytest.mark.more
def test_only_the_list_imports_modules_of_deepspeed() -> None:
    """Elsewhere, a module that moved would end a run with a traceback."""
    for path in sorted((ROOT / "relora_mora").rglob("*.py")):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{each.name}" for each in node.names}
        private = {name for name in imported if name.startswith("deepspeed.")} - {"deepspeed.comm"}
        assert not private or path.stem == "internals", f"{path}: {private}"


def test_a_missing_attribute_is_named_with_the_versions_to_install() -> None:
    bare = internals.FP16_UnfusedOptimizer.__new__(internals.FP16_UnfusedOptimizer)
    bare.optimizer = bare.fp16_groups = bare.overflow_checker = []
    with pytest.raises(internals.DeepSpeedChanged) as raised:
        internals.check_objects(bare)
    text = str(raised.value)
    assert "FP16_UnfusedOptimizer.fp32_groups, FP16_UnfusedOptimizer.overflow_checker.check" in text
    assert "fp16_groups" not in text
    assert f"DeepSpeed {deepspeed.__version__} " in text
    assert "pip install 'deepspeed<" in text


def test_a_module_that_moved_is_named_the_same_way() -> None:
    with pytest.raises(internals.DeepSpeedChanged, match=r"deepspeed\.runtime\.moved"), internals.deepspeed_imports():
        import deepspeed.runtime.moved  # noqa: F401
    with pytest.raises(internals.DeepSpeedChanged, match="cannot import name 'moved'"), internals.deepspeed_imports():
        from deepspeed.runtime.zero.stage3 import moved  # noqa: F401
    with pytest.raises(ModuleNotFoundError), internals.deepspeed_imports():
        import not_installed  # noqa: F401


@pytest.mark.more
def test_deepspeed_starts_on_a_cpu_without_a_warning():
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", "import relora_mora.engine.start"],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
