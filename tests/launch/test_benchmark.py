"""launch/benchmark steps on a model of 0.4 million parameters: tables, JSON, and relations between methods that must
hold."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import torch

from launch.benchmark.contenders import chosen
from launch.benchmark.measure import ByteTracker
from relora_mora.config.load import ConfigError
from tests.tools.commands import module_of
from tests.tools.each import each
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
METHODS = ("full", "frozen", "remora", "remora_int8_decoupled", "relora_resident", "plain")


def command(model: str, *arguments: str) -> tuple[str, str]:
    """Runs on every rank; returns the command's output and its lines of progress."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        options = {key: _number(value) for key, _, value in (argument.partition("=") for argument in arguments)}
        module_of(SCRIPT).main(model, tokens=TOKENS, sequence_length=64, rank=RANK, repeats=2, warmup=1, **options)
    return out.getvalue(), err.getvalue()


def _number(value: str) -> Any:
    return int(value) if value.isdigit() else value


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
        assert values["step_seconds"] > 0
        assert 5 < values["loss"] < 8
        assert values["bytes_sent"] == 0
        assert values["bytes_at_peak"] > values["bytes_held"]
        assert printed.count(f"{name} ") >= 1
    ratios = [line.split()[2] for line in printed.splitlines()[2 : 2 + len(METHODS)]]
    assert ratios[0] == "1.000"
    assert found["remora"]["merge_steps"] > 0
    assert found["full"]["merge_steps"] is None


def test_the_state_is_18_bytes_per_trainable_and_2_per_frozen_parameter(found: dict[str, Any]) -> None:
    """ZeRO-1 in bf16: weight 2, master 4, moments 8, sum of gradients 4."""
    frozen = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * WIDE)
    for name in ("full", "frozen", "remora", "relora_resident"):
        values = found[name]
        frozen_here = 0 if name == "full" else frozen
        expected = 18 * values["trainable_parameters"] + 2 * frozen_here
        assert values["bytes_held"] == pytest.approx(expected, rel=0.02), name


def test_two_ranks_send_the_trainable_fraction(model: str) -> None:
    pool = Pool(2)
    try:
        (first, _), second = pool(command, model, "methods=full,remora", "zero_stage=2", "precision=bf16")
    finally:
        pool.close()
    assert second[0] == "" and "round" not in second[1], "one rank reports"
    full, remora = json.loads(first.splitlines()[-1])["methods"].values()
    # the gradients are summed and the new weights gathered, in bf16
    assert full["bytes_sent"] == pytest.approx(2 * 2 * full["trainable_parameters"], rel=0.01)
    fraction = remora["trainable_parameters"] / full["trainable_parameters"]
    assert fraction < 0.5
    assert remora["bytes_sent"] / full["bytes_sent"] == pytest.approx(fraction, rel=0.05)


def test_the_tracker_sees_temporary_tensors() -> None:
    weights = [torch.ones(1000)]
    with ByteTracker(weights, torch.device("cpu"), 1) as tracker:
        ones = torch.ones(1_000_000)
        del ones
        twos = torch.ones(500_000).exp()  # two tensors at the same time, as large as the previous one
    assert tracker.most == 4_000 + 4_000_000
    assert tracker.now == 4_000 + twos.nbytes


@each("name", ["mora_int9", "full_int8", "remora_int8_fp8", "remora_merged_resident", "peft", "", "plain_compiled"])
def test_names_that_no_contender_has_and_peers_of_several_processes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--methods: "):
        chosen(["full", "remora_int8_compiled", name], 1)
    with pytest.raises(ConfigError, match="--methods: plain runs only in one process"):
        chosen(["plain"], 2)
