"""launch/benchmark steps on a model of 0.4 million parameters: tables, JSON, and relations between methods that must
hold."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from launch.benchmark.byte_tracker import PARTS, ByteTracker
from launch.benchmark.contenders import CONTENDERS, Setting
from relora_mora.adapters.layers import adapter_layers
from relora_mora.operators import square_size
from tests.tools.commands import module_of
from tests.tools.pool import Pool

pytestmark = [pytest.mark.more, pytest.mark.distributed]

SCRIPT = "launch/benchmark/steps.py"
HIDDEN = 96
WIDE = 256
VOCABULARY = 512
LAYERS = 3
RANK = 16
TOKENS = 256
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
METHODS = ("full", "frozen", "remora", "remora_decoupled", "remora_released", "relora", "plain")


def command(model: str, *arguments: str) -> tuple[str, str]:
    """Runs on every rank; returns the command's output and its lines of progress."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        options = {key: _number(value) for key, _, value in (argument.partition("=") for argument in arguments)}
        module_of(SCRIPT).main(model, tokens=TOKENS, sequence_length=64, rank=RANK, repeats=2, warmup=1, **options)
    return out.getvalue(), err.getvalue()


def _number(value: str) -> Any:
    return int(value) if value.isdigit() else value


def setting(*, bf16: bool = True) -> Setting:
    config = LlamaConfig(**{key: value for key, value in MODEL.items() if key != "model_type"}, use_cache=False)
    values: dict[str, Any] = {"tokens": TOKENS, "sequence_length": 64, "accumulation": 1, "zero_stage": 1, "rank": RANK}
    return Setting(config, **values, square_multiple=1, bf16=bf16, device=torch.device("cpu"))


def losses_of_the_forms(bf16: bool) -> dict[str, float]:
    """Runs in the pool; returns the loss of three forms with the same nonzero M."""
    found = {}
    for name in ("remora", "remora_decoupled", "remora_released"):
        contender: Any = CONTENDERS[name](setting(bf16=bf16))
        for index, (_, layer) in enumerate(adapter_layers(contender.model)):
            M = torch.randn(layer.mora_M.shape, generator=torch.Generator().manual_seed(index))
            layer.mora_M.data.copy_(0.1 * M)
        with torch.no_grad():
            found[name] = float(contender.engine(*contender.batches[0]))
    return found


@pytest.fixture(scope="module")
def one() -> Iterator[Pool]:
    pool = Pool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("benchmark") / "model.json"
    path.write_text(json.dumps(MODEL))
    return str(path)


@pytest.fixture(scope="module")
def printed(one: Pool, model: str) -> str:
    return one(command, model, f"methods={','.join(METHODS)}", "precision=bf16")[0][0]


@pytest.fixture(scope="module")
def found(printed: str) -> dict[str, Any]:
    return json.loads(printed.splitlines()[-1])["methods"]


def test_every_field_is_reported_and_the_first_is_the_reference(found: dict[str, Any], printed: str) -> None:
    assert list(found) == list(METHODS)
    for name, values in found.items():
        assert min(values["step_seconds"], values["processor_seconds"]) > 0
        assert values["page_faults"] >= 0
        assert 5 < values["loss"] < 8
        assert values["bytes_sent"] == {}
        assert set(values["bytes_at_peak"]) == set(PARTS)
        assert printed.count(f"\n{name} ") == 3, "a line in each of the three tables"
    ratios = {key: value for key, value in found["full"].items() if key.endswith("ratio") and key != "bytes_sent_ratio"}
    assert set(ratios.values()) == {1.0}
    assert len(ratios) == 7
    assert found["remora"]["merge_seconds"] > 0
    assert found["full"]["merge_seconds"] is None


def test_the_state_is_18_bytes_per_trainable_and_2_per_frozen_parameter(found: dict[str, Any]) -> None:
    """ZeRO-1 in bf16: weight 2, master 4, moments 8, sum of gradients 4."""
    frozen = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * WIDE)
    for name in ("full", "frozen", "remora", "remora_released", "relora"):
        values = found[name]
        frozen_here = 0 if name == "full" else frozen
        held = {part: size for part, size in values["bytes_held"].items() if part != "host"}
        assert sum(held.values()) == pytest.approx(18 * values["trainable_parameters"] + 2 * frozen_here, rel=0.02), (
            name
        )
        assert held["optimizer"] == pytest.approx(12 * values["trainable_parameters"], rel=0.01), name
        assert values["bytes_held"]["host"] == 4 * frozen_here


def test_merged_remora_keeps_only_the_compressed_inputs_each_once(found: dict[str, Any]) -> None:
    narrow = square_size(HIDDEN, HIDDEN, RANK)
    wide = square_size(HIDDEN, WIDE, RANK)
    linears = {name: values["bytes_kept_by_its_linears"] for name, values in found.items()}
    assert linears["full"] == 2 * TOKENS * (3 * HIDDEN + WIDE)  # inputs of q, k, v; of o; of gate, up; of down
    assert linears["remora"] == 2 * TOKENS * (2 * narrow + 2 * wide)
    assert linears["remora_decoupled"] == 2 * TOKENS * (4 * narrow + 3 * wide)  # every linear keeps its own input
    assert found["remora"]["bytes_kept_for_backward"] < found["full"]["bytes_kept_for_backward"]


def test_the_released_operations_are_the_same_function(one: Pool) -> None:
    [exact] = one(losses_of_the_forms, False)
    [rounded] = one(losses_of_the_forms, True)
    assert exact["remora_released"] == pytest.approx(exact["remora"], rel=1e-5)
    assert rounded["remora_released"] == pytest.approx(rounded["remora_decoupled"], rel=1e-2)


def test_two_ranks_send_the_trainable_fraction(model: str) -> None:
    pool = Pool(2)
    try:
        (first, _), second = pool(command, model, "methods=full,remora", "zero_stage=2", "precision=bf16")
    finally:
        pool.close()
    assert second[0] == "" and "round" not in second[1], "one rank reports"
    full, remora = json.loads(first.splitlines()[-1])["methods"].values()
    # the gradients are summed and the new weights gathered, in bf16
    assert sum(full["bytes_sent"].values()) == pytest.approx(2 * 2 * full["trainable_parameters"], rel=0.01)
    assert remora["trainable_ratio"] < 0.5
    assert remora["bytes_sent_ratio"] == pytest.approx(remora["trainable_ratio"], rel=0.05)


def test_the_tracker_sees_temporary_tensors() -> None:
    model = CONTENDERS["plain"](setting()).model
    with ByteTracker(model, {"weights": [p.data for p in model.parameters()]}, torch.device("cpu"), 1) as tracker:
        ones = torch.ones(1_000_000)
        del ones
        twos = torch.ones(500_000).exp()  # two tensors at the same time, as large as the previous one
    weights = sum(p.nbytes for p in model.parameters())
    assert tracker.peak == {"weights": weights, "optimizer": 0, "gradients": 0, "activations": 0, "rest": 4_000_000}
    assert tracker.sizes["rest"] == twos.nbytes
