"""The numbers of a plan, and its words."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relora_mora.experiments.planner import plan as planner
from relora_mora.experiments.planner.plan import FRAGMENTATION, PROCESS_BYTES, Cluster, Plan
from relora_mora.experiments.planner.render import duration, tables
from relora_mora.system.devices import CPU, DEVICES, device_of_name, named_device
from relora_mora.system.hardware import device_here
from tests.tools.each import each

TWO = Cluster(1, 2, CPU)
H100 = named_device("h100")
BATCH = {"train.batch_size": "64"}

pytestmark = pytest.mark.usefixtures("at_root")


def plan_of(cluster: Cluster = TWO, how: dict[str, Any] | None = None, **overrides: str) -> Plan:
    """The plan of a small run in bf16 on devices of 1 TFLOP/s, at every stage."""
    settings = {"train.precision": "bf16", "log.peak_tflops": "1", **overrides}
    return planner.plan_of("tiny_remora_paper", settings, cluster, every_stage=True, **(how or {}))


@pytest.mark.more
def test_parameters_tokens_and_the_time_that_follows_from_known_rates() -> None:
    assumed, given, measured = plan_of(), plan_of(how={"utilization": 0.8}), plan_of(how={"measured": 2000.0})
    counts = assumed["parameters"]
    assert counts["total"] == 7_358_720
    # MoRA has at most LoRA's 7 layers' r (in + out): here R = floor(sqrt(...)) loses less than 2 %
    lora = 32 * 4 * (4 * 512 + 3 * (256 + 688))
    assert 0.98 * lora < counts["adapters"] <= lora
    assert counts["trainable"] == 2 * 8192 * 256 + 9 * 256 + counts["adapters"]
    assert (assumed["tokens_per_step"], assumed["tokens"]) == (4096, 4_096_000)
    assert assumed["tokens_per_second"] == pytest.approx(2 * 0.4e12 / assumed["flops"]["total"])
    assert given["seconds"] == pytest.approx(assumed["seconds"] / 2)
    assert measured["seconds"] == 2048.0
    assert assumed["assumption"] == "40.0% of 1 TFLOP/s a device (log.peak_tflops)"
    assert measured["assumption"].startswith(f"{2000 * measured['flops']['total'] / 2e12:.1%} of ")


@pytest.mark.more
def test_what_no_gpu_has_confirmed_and_what_launches_would_exceed_is_marked() -> None:
    gpus = Cluster(1, 2, H100)
    fast = {"log.peak_tflops": "989"}
    plans = {
        "fast": plan_of(gpus, **fast),
        "slow": plan_of(gpus),
        "given": plan_of(gpus, {"utilization": 0.4}),
        "measured": plan_of(gpus, {"measured": 2000.0}, **fast),
        "cpu": plan_of(**fast),
    }
    marked = [name for name, plan in plans.items() if any("the time is too short" in note for note in plan["notes"])]
    assert marked == ["fast"]
    unconfirmed = [name for name, plan in plans.items() if "which no GPU has confirmed" in plan["assumption"]]
    assert unconfirmed == ["fast", "slow"]


def test_muon_is_arithmetic_of_whole_matrices_and_one_moment() -> None:
    adamw, muon = plan_of(), plan_of(**{"optim.matrices": "muon"})
    # R of the four squares of attention and of the three of the MLP, in each of four layers
    assert muon["optimizer_flops"] == 4 * (4 * 30 * 128**3 + 3 * 30 * 173**3)
    assert adamw["optimizer_flops"] == 0
    adapters = muon["parameters"]["adapters"]
    assert adamw["memory"][0]["optimizer"] - muon["memory"][0]["optimizer"] == 4 * adapters
    # the memory bandwidth of a CPU is unknown, so only the products remain
    seconds = [muon["steps"][stage]["optimizer"] for stage in (0, 1)]
    assert seconds == pytest.approx([muon["optimizer_flops"] / 0.4e12, muon["optimizer_flops"] / 0.8e12])
    assert [muon["steps"][stage]["exchanged"] for stage in (2, 3)] == [0, pytest.approx(8 * adapters / 2)]


@pytest.mark.more
def test_tables_show_every_number_in_its_unit() -> None:
    plan = plan_of()
    lines = {line[:32].strip(): line[32:].split() for line in tables(plan).splitlines()}
    assert lines["ZeRO stage (* in the settings)"] == ["0", "1", "2*", "3"]
    memory, steps = plan["memory"], plan["steps"]
    assert lines["device"] == [f"{memory[stage]['device'] / 2**30:.3g}" for stage in memory]
    assert lines["host base"] == [f"{memory[stage]['host_base'] / 2**30:.3g}" for stage in memory]
    assert lines["sent"] == [f"{steps[stage]['sent'] / 1e9:.3g}" for stage in steps]
    assert lines["compute"] == [f"{steps[stage]['compute']:.3g}" for stage in steps]
    assert "hidden" not in lines, "rows without a number are left out"


FOUND = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 3060": "rtx3060",
    "NVIDIA L40S": "l40s",
}
UNKNOWN = ["GeForce GTX 1080", "L40", "GH200 480GB", "A100-SXM4-80GB MIG 1g.10gb", "H100 NVL", "H200 NVL"]
UNKNOWN += [f"GeForce RTX {name}" for name in ("4090 D", "4090 Laptop GPU", "3090 Ti", "3060 Ti", "4080 SUPER")]
ALIASES = {
    **dict.fromkeys(("4090", "NVIDIA GeForce RTX 4090"), "rtx4090"),
    **dict.fromkeys(("a100", "cuda"), "a100-80gb"),
    "A100_40GB": "a100-40gb",
    "h100 pcie": "h100-pcie",
    "CPU": "cpu",
}


@pytest.mark.more
def test_a_process_on_a_cpu_needs_most_in_a_step_or_at_its_start() -> None:
    plan = plan_of()
    memory = plan["memory"][2]
    in_training = PROCESS_BYTES + memory["device"] + memory["host_base"] + memory["host_checkpoint"]
    assert plan["resident"] == pytest.approx(FRAGMENTATION * in_training)
    small = {"train.micro_batch_size": "1", "model.config": "configs/model/llama_130m.json", "method.name": "lora"}
    only = {f"method.train_{what}": "false" for what in ("embeddings", "norms", "head")}
    trained, begun = (plan_of(**small, **only, **more) for more in ({}, {"model.init_from": "models/base"}))
    memory = begun["memory"][2]
    assert memory["host_start"] == 4 * begun["parameters"]["total"]
    at_start = sum(memory[part] for part in ("weights", "masters", "host_base", "host_start"))
    assert begun["resident"] == pytest.approx(PROCESS_BYTES + at_start)
    assert begun["resident"] > trained["resident"]


@pytest.mark.more
def test_widths_that_a_gpu_is_slow_with_are_named() -> None:
    odd = {"model.overrides": "{intermediate_size: 5461}"}
    [note] = plan_of(Cluster(1, 2, H100), **odd)["notes"]
    assert "intermediate_size of 5,461 is not a multiple of 8" in note and "5,464 would be better" in note
    assert plan_of(**odd)["notes"] == []


def test_devices_are_found_by_their_names() -> None:
    found = {name: device_of_name(name) for name in FOUND}
    assert {name: device and device.name for name, device in found.items()} == FOUND
    assert {name: device_of_name(f"NVIDIA {name}") for name in UNKNOWN} == dict.fromkeys(UNKNOWN)
    assert {name: named_device(name).name for name in ALIASES} == ALIASES
    known = ("tflops", "memory_gb", "memory_gbytes_per_s", "source")
    assert all(getattr(device, key) for device in DEVICES for key in known)


@each(
    "name,memory,shown",
    [("A100-PCIE-40GB", 42.0, "a100-80gb"), ("L5", 12.0, "NVIDIA L5")],
)
def test_the_card_of_this_machine(monkeypatch: pytest.MonkeyPatch, name: str, memory: float, shown: str) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"NVIDIA {name}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory * 1e9))
    card = device_here()
    assert (card.name, card.memory_gb, card.tflops > 0) == (shown, memory, name != "L5")
    plan = plan_of(Cluster(2, 1, card, link_gbits=8.0))
    assert plan["memory"][1]["fits"] is True
    assert plan["steps"][1]["network"] == pytest.approx(plan["steps"][1]["sent"] / 1e9)
    assert (plan["steps"][1]["optimizer"] > 0) == (name != "L5")


@pytest.mark.more
def test_time_of_a_step_on_a_cluster() -> None:
    """With a hundred times slower network, stage 1 waits for all traffic, and stage 3 for what is not hidden."""
    plan = plan_of(Cluster(2, 4, H100, link_gbits=80.0), **BATCH)
    trainable = plan["parameters"]["trainable"]
    one, three = plan["steps"][1], plan["steps"][3]
    all_reduced_and_gathered = (2 * 2 + 2) * trainable * 7 / 8  # in bf16
    assert one["network"] == pytest.approx(all_reduced_and_gathered / 10e9)
    assert one["optimizer"] == pytest.approx(30 * trainable / 8 / 3350e9)
    assert one["compute"] == pytest.approx(plan["flops"]["total"] * plan["tokens_per_step"] / (8 * 0.4e12))
    assert one["hidden"] == 0
    assert one["seconds"] == one["compute"] + one["optimizer"] + one["network"]
    assert three["hidden"] == min(three["network"], three["compute"]) > 0
    zero = {"train.deepspeed": "{zero_optimization: {overlap_comm: false}}"}
    waiting = plan_of(Cluster(2, 4, H100, link_gbits=80.0), **BATCH, **zero)
    assert [waiting["steps"][stage]["hidden"] for stage in (2, 3)] == [0, 0]
    assert plan["steps"][2]["hidden"] > 0
    slow = plan_of(Cluster(2, 4, H100, link_gbits=0.8), **BATCH)["steps"]
    assert slow[1]["network"] == pytest.approx(100 * one["network"])
    assert slow[3]["seconds"] == pytest.approx(slow[3]["network"] + slow[3]["optimizer"])
    within = plan_of(Cluster(1, 8, H100), **BATCH)["steps"]
    assert within[1]["network"] == pytest.approx(one["network"] * 10 / 450)
    again = plan_of(Cluster(1, 8, H100), **BATCH, **{"model.activation_checkpointing": "true"})["steps"]
    wide = plan_of(Cluster(1, 8, H100), **BATCH, **{"train.deepspeed": "{communication_data_type: fp32}"})
    assert wide["steps"][2]["all_reduced"] == 2 * within[2]["all_reduced"]
    assert again[2]["compute"] > 1.2 * within[2]["compute"]


@each(
    ("seconds", "text"),
    [(6.05, "6 s"), (306, "5.1 min"), (31 * 3600, "31 h"), (76 * 3600.0, "3.2 days"), (913 * 86400.0, "2.5 years")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.more
def test_ranks_on_one_host_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "peak_flops", lambda **_: (1e12, "the test"))
    one, two = (planner.plan_of("tiny_remora", {}, Cluster(1, ranks, CPU)) for ranks in (1, 2))
    assert one["seconds"] == pytest.approx(two["seconds"])
