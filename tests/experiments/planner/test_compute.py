"""The planner's time of a micro-batch on a GPU, whose numbers agree with the counts."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from relora_mora.config.load import load_config
from relora_mora.config.registry import METHODS, Adapter
from relora_mora.experiments.planner.cluster import Cluster
from relora_mora.experiments.planner.compute import COMPILED, EAGER, LAUNCH_SECONDS, compute_time
from relora_mora.experiments.planner.plan import make_plan
from relora_mora.model.config import read_model_config
from relora_mora.sizing.setup import Setup
from relora_mora.system.devices import named_device
from tests.tools.helpers import ROOT

TOKENS = 8192
COUNTS = list(csv.DictReader((ROOT / "tests/fakecuda/counts.csv").read_text().splitlines()))


pytestmark = pytest.mark.usefixtures("at_root")


@pytest.mark.parametrize(("how", "table"), [("eager", EAGER), ("compiled", COMPILED)])
@pytest.mark.parametrize(
    "method,base,resident",
    [
        ("full", None, False),
        *((method, None, resident) for method in ("relora", "remora") for resident in (False, True)),
        *((method, "int8", resident) for method in ("relora", "remora") for resident in (False, True)),
        *((method, "fp8", True) for method in ("relora", "remora")),
    ],
)
def test_work_of_a_layer_is_what_was_counted(method, base, resident, how, table):
    work = table[METHODS[method].adapter, base, resident]
    rows = [row for row in COUNTS if row["method"].split()[0] == method and row["compiled"] == how]
    rows = [row for row in rows if row["method"].endswith(" resident") == resident]
    rows = [row for row in rows if ({"int8", "fp8"} & {*row["method"].split()} or {None}) == {base}]
    assert work.launches == max(int(row["launches"]) for row in rows)
    width = {"llama_250m": 768, "llama_1_3b": 2048}
    moved = [int(row["moved_mb"]) * 1e6 / TOKENS / width[row["model"]] for row in rows]
    assert work.moved == pytest.approx(sum(moved) / len(moved), rel=0.02)
    assert moved == pytest.approx([work.moved] * len(moved), rel=0.1)  # it grows like the hidden size


def test_a_fast_device_waits_for_its_host_and_a_slow_one_does_not():
    config = load_config("configs/run/paper_250m_remora.yaml", {}, world_size=1)
    model = read_model_config(config.model)
    fast, slow = (
        compute_time(
            model,
            Setup(config, 1, 1, bf16=True, on_gpu=True, compiled=False),
            device,
            peak=device.tflops * 1e12,
            flops_per_token=1.15e9,
            resident=True,
        )
        for device in (named_device("b200"), named_device("l4"))
    )
    assert fast.total == fast.host == slow.host
    assert slow.total == slow.products + slow.passes > slow.host


@pytest.mark.parametrize("resident", [True, False])
def test_an_adapter_without_counts_is_treated_as_lora(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("configs/run/paper_250m_relora.yaml", {}, world_size=1)
    model = read_model_config(config.model)
    h100 = named_device("h100")

    def seconds() -> float:
        setup = Setup(config, 1, 1, bf16=True, on_gpu=True, compiled=True)
        return compute_time(model, setup, h100, peak=1e15, flops_per_token=1e9, resident=resident).total

    of_lora = seconds()
    monkeypatch.setitem(METHODS, "relora", replace(METHODS["relora"], adapter=Adapter("new:Layer")))
    assert seconds() == of_lora


@pytest.mark.parametrize("base", ["int8", "fp8"])
@pytest.mark.parametrize("form", ["resident", "decoupled"])
def test_products_in_8_bits_take_half_as_long(base: str, form: str) -> None:
    seconds = []
    for settings in ({}, {"method.base": base, "method.base_products": "true", "method.form": form}):
        config = load_config("configs/run/paper_250m_remora.yaml", settings, world_size=1)
        setup = Setup(config, 1, 1, bf16=True, on_gpu=True)
        h100 = named_device("h100")
        model = read_model_config(config.model)
        given = {"peak": 1e15, "flops_per_token": 1e9, "resident": form == "resident"}
        seconds.append(compute_time(model, setup, h100, in_8_bits=8e8 if settings else 0, **given).products)
    assert seconds[1] == pytest.approx(0.6 * seconds[0])


@pytest.mark.parametrize("compiled", [True, False])
def test_one_micro_batch_builds_resident_weights_for_itself(compiled: bool) -> None:
    def launches(micro_batches: int, *, resident: bool) -> float:
        size = {"train.batch_size": 4 * micro_batches, "train.micro_batch_size": 4}
        config = load_config("configs/run/paper_250m_remora.yaml", size, world_size=1)
        setup = Setup(config, 1, 1, bf16=True, on_gpu=True, compiled=compiled)
        work = {"peak": 1e15, "flops_per_token": 1e9, "resident": resident}
        host = compute_time(read_model_config(config.model), setup, named_device("h100"), **work).host
        return host / LAUNCH_SECONDS / 24

    rebuilt = launches(1, resident=False)
    assert launches(1, resident=True) == pytest.approx(rebuilt - 7)
    assert launches(7, resident=True) == pytest.approx(rebuilt - 13)


def test_a_given_utilisation_replaces_the_calculation():
    device = named_device("h100")
    peak = device.tflops * 1e12

    def plan(utilisation=None, compiled="auto"):
        config = load_config("configs/run/paper_250m_full.yaml", {"model.compile": compiled}, world_size=1)
        return make_plan(
            read_model_config(config.model),
            config,
            cluster=Cluster(1, 1, device),
            bf16=True,
            on_cpu=False,
            peak=(peak, "the test"),
            utilisation=utilisation,
        )

    calculated = plan().time
    given = plan(0.4)
    arithmetic = given.flops.performed * given.config.tokens_per_step / peak
    assert given.time.steps[1].compute == pytest.approx(arithmetic / 0.4)
    assert calculated.steps[1].compute != given.time.steps[1].compute
    # ZeRO-3 is never compiled
    eager = plan(compiled="false").time
    assert calculated.steps[1].compute < eager.steps[1].compute == calculated.steps[3].compute
    assert f"calculated, {arithmetic / calculated.steps[1].compute:.0%} of 989 TFLOP/s" in calculated.assumption
