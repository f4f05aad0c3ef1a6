"""Every faster way trains like the reference: decoupled adapters, torch only, cross-entropy over whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tests.tools.grids import rest
from tests.tools.runs import metrics, run_config, train
from tests.train.compiled import compiled_graphs, compiler_only

pytestmark = pytest.mark.distributed

TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3}  # relative; in bf16 the two ways round differently


def _plain(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, tokens: float | None = None
) -> torch.Tensor:
    logits = F.linear(hidden, weight).flatten(0, -2).float()
    return F.cross_entropy(logits, labels.flatten(), reduction="sum") / (tokens or (labels != -100).sum())


def train_as_the_reference(config: Any) -> None:
    from relora_mora import kernels
    from relora_mora.model import loss

    with kernels.disabled(), mock.patch.object(loss, "chunked_cross_entropy", _plain):
        train(config)


def _losses(folder: Path) -> list[float]:
    """Losses of steps and evaluations; if there is a set called text, only of that set."""
    lines = metrics(folder)
    of_sets = "eval/text/loss" if any("eval/text/loss" in line for line in lines) else "eval/loss"
    return [line[key] for line in lines for key in ("train/loss", of_sets) if key in line]


@pytest.fixture(scope="module")
def golden(pools, tmp_path_factory, tokenizer_path):
    """Losses of the reference, by method and precision, computed at the first request."""
    from tests.tools.runs import write_inputs

    inputs, known = write_inputs(tmp_path_factory.mktemp("golden")), {}

    def losses(method: str, precision: str) -> list[float]:
        if (method, precision) not in known:
            folder = inputs / f"{method}-{precision}"
            form = {"form": "decoupled"} if method != "full" else {}
            pools(1)(
                train_as_the_reference, _config(inputs, tokenizer_path, folder, method, precision, method_sections=form)
            )
            known[method, precision] = _losses(folder)
        return known[method, precision]

    losses.inputs = inputs  # type: ignore[attr-defined]
    return losses


def _config(inputs: Path, tokenizer: str, folder: Path, method: str, precision: str, **sections: dict[str, Any]) -> Any:
    method_sections = {"name": method, **sections.pop("method_sections", {})}
    training = {"precision": precision, "zero_stage": 1, **sections.pop("train", {})}
    checkpoints = {"every_steps": 0}
    return run_config(
        inputs, tokenizer, folder, 1, method=method_sections, train=training, checkpoint=checkpoints, **sections
    )


OF_ADAPTERS = ("resident", "merged", "checkpointing", "torch only")
WAYS = [
    *(("remora", way) for way in OF_ADAPTERS),
    *(("full", way) for way in ("default", "checkpointing", "torch only")),
    *(("relora", way) for way in OF_ADAPTERS),
]
# one precision after the other: each method has both, and each way of adapters
EACH: list[Any] = [(*case, ("bf16", "fp32")[number % 2]) for number, case in enumerate(WAYS)]
SLOW = [("full", "torch only"), ("full", "checkpointing"), ("relora", "torch only")]  # remora has both ways
CASES = [case for case in EACH if case[:2] not in SLOW]
CASES += rest(*(case for case in EACH if case[:2] in SLOW))
CASES += rest(*((*case, ("fp32", "bf16")[number % 2]) for number, case in enumerate(WAYS)))


@pytest.mark.parametrize(("method", "way", "precision"), CASES)
def test_losses_equal_the_reference(golden, pools, tokenizer_path, tmp_path, method, precision, way):
    expected = golden(method, precision)
    sections: dict[str, dict[str, Any]] = {"model": {"activation_checkpointing": way == "checkpointing"}}
    if method != "full" and way != "checkpointing":
        sections["method_sections"] = {"form": "resident" if way == "resident" else "merged"}
    config = _config(golden.inputs, tokenizer_path, tmp_path / "run", method, precision, **sections)
    pools(1)(train_without_kernels if way == "torch only" else train, config)
    losses = _losses(tmp_path / "run")
    assert len(losses) == len(expected) > 12
    assert losses == pytest.approx(expected, rel=TOLERANCE[precision])
    assert expected[0] - expected[-1] > 0.05  # it trains


def train_without_kernels(config: Any) -> None:
    from relora_mora import kernels

    with kernels.disabled():
        train(config)


BASES = [("int8", "resident", "bf16"), *rest(("int8", "decoupled", "fp32"), ("fp8", "decoupled", "bf16"))]


@pytest.mark.parametrize("base,form,precision", BASES)
def test_weights_in_8_bits_train_nearly_as_the_reference(
    golden, pools, tokenizer_path, tmp_path, base, form, precision
):
    found = {}
    for way in (train, train_without_kernels):
        settings = {"method_sections": {"base": base, "form": form}}
        config = _config(golden.inputs, tokenizer_path, tmp_path / way.__name__, "remora", precision, **settings)
        pools(1)(way, config)
        found[way] = _losses(tmp_path / way.__name__)
    assert found[train] == pytest.approx(found[train_without_kernels], rel=TOLERANCE["bf16"])
    assert found[train] == pytest.approx(golden("remora", precision), rel=2e-2)


@compiler_only
@pytest.mark.parametrize("method,stage", [("remora", 1), *rest(("relora", 2), ("full", 0))])
def test_compiled_layers_train_as_the_reference(golden, pools, tokenizer_path, tmp_path, method, stage):
    sections: dict[str, Any] = {"model": {"compile": True}, "train": {"zero_stage": stage}}
    if method == "full":  # a second kind of batches, less than a micro-batch of it
        few = tmp_path / "few.jsonl"
        few.write_text('{"prompt": "the rank", "completion": "matrix"}\n')
        sets = {
            "text": f"{golden.inputs}/validation/*.json.gz",
            "few": [{"source": str(few), "records": {"kind": "prompt"}}],
        }
        sections["data"] = {"validation": sets}
    config = _config(golden.inputs, tokenizer_path, tmp_path / "run", method, "fp32", **sections)
    [(at_start, at_end)] = pools(1)(compiled_graphs, config)
    assert 0 < at_start == at_end  # no merge and no evaluation waits for a compiler
    losses = _losses(tmp_path / "run")
    assert losses == pytest.approx(golden(method, "fp32"), rel=TOLERANCE["fp32"])
