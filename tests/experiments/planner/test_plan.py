"""The plan of a run, and its command line."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from relora_mora.config.load import load_config
from relora_mora.experiments.planner.plan import FRAGMENTATION, PROCESS_BYTES, Plan
from relora_mora.experiments.planner.render import answer, duration, tables
from relora_mora.experiments.planner.step import Cluster
from relora_mora.model.config import read_model_config
from relora_mora.system.devices import CPU, DEVICES, device_of_name, named_device
from relora_mora.system.hardware import device_here
from tests.tools.commands import PLAN, call
from tests.tools.each import each
from tests.tools.helpers import ROOT
from tests.tools.rules import matrices_settings

CONFIG = ROOT / "configs" / "run" / "tiny_remora_paper.yaml"


pytestmark = pytest.mark.usefixtures("at_root")


TWO = Cluster(1, 2, CPU)


def plan_of(
    tokens_per_second: float | None = None, utilization: float | None = None, cluster: Cluster = TWO, **overrides: str
) -> Plan:
    config = load_config(CONFIG, overrides, world_size=cluster.world_size)
    return Plan(
        read_model_config(config.model),
        config,
        cluster=cluster,
        bf16=True,
        peak=(1e12, "the test"),
        measured=tokens_per_second,
        utilization=utilization,
    )


def test_parameters_and_tokens() -> None:
    plan = plan_of()
    assert plan.parameters.total == 7_358_720
    # MoRA has at most LoRA's 7 layers' r (in + out): here R = floor(sqrt(...)) loses less than 2 %
    lora = 32 * 4 * (4 * 512 + 3 * (256 + 688))
    assert 0.98 * lora < plan.parameters.adapters <= lora
    assert plan.parameters.trainable == 2 * 8192 * 256 + 9 * 256 + plan.parameters.adapters
    assert (plan.config.tokens_per_step, plan.tokens) == (4096, 4_096_000)


@pytest.mark.more
def test_time_follows_from_the_known_rates() -> None:
    assumed, given, measured = plan_of(), plan_of(utilization=0.8), plan_of(tokens_per_second=2000.0)
    assert assumed.tokens_per_second == pytest.approx(2 * 0.4e12 / assumed.flops.performed)
    assert given.seconds == pytest.approx(assumed.seconds / 2)
    assert measured.seconds == 2048.0
    assert "assuming 40% of 1 TFLOP/s a device (the test)" in assumed.assumption
    assert f"{2000 * measured.flops.total / 2e12:.1%}" in measured.assumption
    assert plan_of(**{"log.peak_tflops": "2.0"}).seconds == pytest.approx(assumed.seconds / 2)

    gpus = Cluster(1, 2, named_device("h100"))
    unconfirmed = plan_of(cluster=gpus)
    assert "assuming 40% of 1 TFLOP/s a device (the test), which no GPU has confirmed" in unconfirmed.assumption
    unmarked = (assumed, plan_of(cluster=gpus, utilization=0.4), plan_of(cluster=gpus, tokens_per_second=2000.0))
    assert not any("confirmed" in plan.assumption for plan in unmarked)
    assert unconfirmed.at(2).step == unmarked[1].at(2).step


def test_muon_is_arithmetic_of_whole_matrices_and_one_moment() -> None:
    adamw, muon = plan_of(), plan_of(**{"optim.matrices": "muon"})
    # R of the four squares of attention and of the three of the MLP, in each of four layers
    assert muon.optimizer_flops == 4 * (4 * 30 * 128**3 + 3 * 30 * 173**3)
    assert adamw.optimizer_flops == 0
    assert "muon" not in tables(adamw)
    share = muon.optimizer_flops / (muon.flops.total * muon.config.tokens_per_step)
    assert f"TFLOP a step, {share:.2%} more, in all ranks" in tables(muon)
    both = plan_of(**{"optim.matrices": "muon", "optim.others": "adamw8bit"})
    assert "optimizer: muon, adamw8bit of embeddings and head: " in tables(both)
    saved = adamw.at(0).memory.optimizer - muon.at(0).memory.optimizer
    assert saved == 4 * muon.parameters.adapters
    # the memory bandwidth of a CPU is unknown, so only the products remain
    assert muon.at(0).step.optimizer == pytest.approx(muon.optimizer_flops / 0.4e12)
    assert muon.at(1).step.optimizer == pytest.approx(muon.at(0).step.optimizer / 2)
    assert muon.at(3).network.exchanged == pytest.approx(8 * muon.parameters.adapters / 2)
    assert muon.at(2).network.exchanged == 0


@pytest.mark.more
def test_the_state_of_a_rule_of_ones_own_is_counted() -> None:
    adamw = plan_of(**{"method.name": "full"})
    matrices = matrices_settings("galore")["matrices"]
    plan = plan_of(**{"method.name": "full", "optim.matrices": matrices, "optim.rule": "{rank: 64}"})
    # four layers with hidden 256 and intermediate 688: moments [64, 256] or [64, 688], and a projection [256, 64]
    attention, mlp = (2 * 64 * long + 256 * 64 + 1 for long in (256, 688))
    of_adamw = 8 * 4 * (4 * 256 * 256 + 3 * 256 * 688)
    kept = 4 * 4 * (4 * attention + 3 * mlp)
    for stage, share in ((0, 1), (1, 2), (2, 2), (3, 2)):
        saved = adamw.at(stage).memory.optimizer - plan.at(stage).memory.optimizer
        assert saved == (of_adamw - kept) / share
    [note] = [note for note in plan.notes if "GaLore" in note]
    assert "state_shapes" in note
    assert not any("state_shapes" in note for note in adamw.notes)


@pytest.mark.more
def test_tables_name_every_part() -> None:
    plan = plan_of()
    text = tables(plan)
    assert "7,358,720 in the model; remora trains" in text
    assert "4,096 tokens a step, 4,096,000 in all" in text
    assert re.search(r"ZeRO stage.* 2\*", text), "the stage in the settings is marked"
    memory = plan.at(2).memory
    host = memory.host_base + memory.host_checkpoint
    assert plan.resident == FRAGMENTATION * (PROCESS_BYTES + memory.device + host)
    assert f"needs {plan.resident / 2**30:.3g} GiB for each process" in text
    small = plan_of(**{"train.micro_batch_size": "1", "model.activation_checkpointing": "true"})
    assert small.savings == ["set method.base=int8", "take more or larger devices"]
    assert plan.savings == ["lower train.micro_batch_size", "set model.activation_checkpointing", *small.savings]


@pytest.mark.more
def test_a_start_from_other_weights_may_take_more_than_a_step() -> None:
    small = {"train.micro_batch_size": "1", "model.config": "configs/model/llama_130m.json", "method.name": "lora"}
    alone = {f"method.train_{what}": "false" for what in ("embeddings", "norms", "head")}
    trained, begun = (plan_of(**small, **alone, **more) for more in ({}, {"model.init_from": "models/base"}))
    memory = begun.at(2).memory
    assert (trained.at(2).memory.host_start, memory.host_start) == (0, 4 * begun.parameters.total)
    at_start = PROCESS_BYTES + memory.weights + memory.masters + memory.host_base + memory.host_start
    assert begun.resident == at_start > trained.resident


@pytest.mark.more
def test_widths_that_a_gpu_is_slow_with_are_named() -> None:
    odd = {"model.overrides": "{intermediate_size: 5461}"}
    plan = plan_of(cluster=Cluster(1, 2, named_device("h100")), **odd)
    [note] = plan.notes
    assert f"note: {note}" in " ".join(answer(plan).split())
    assert "intermediate_size of 5,461 is not a multiple of 8" in note and "5,464 would be better" in note
    assert plan_of(**odd).notes == []


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
    "4090": "rtx4090",
    "RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "a100": "a100-80gb",
    "A100_40GB": "a100-40gb",
    "h100 pcie": "h100-pcie",
    "cuda": "a100-80gb",
    "CPU": "cpu",
}


def test_devices_are_found_by_their_names() -> None:
    found = {name: device_of_name(name) for name in FOUND}
    assert {name: device and device.name for name, device in found.items()} == FOUND
    assert {name: device_of_name(f"NVIDIA {name}") for name in UNKNOWN} == dict.fromkeys(UNKNOWN)
    names = ALIASES | {name.upper(): name for name in FOUND.values()}
    assert {name: named_device(name).name for name in names} == names
    known = ("tflops", "memory_gb", "memory_gbytes_per_s", "source")
    assert all(getattr(device, key) for device in DEVICES for key in known)


@each("name,shown,memory", [("A100-PCIE-40GB", "a100-80gb", 42.0), ("L5", "NVIDIA L5", 12.0)])
def test_a_card_has_its_stated_memory(monkeypatch: pytest.MonkeyPatch, name: str, shown: str, memory: float) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"NVIDIA {name}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory * 1e9))
    card = device_here()
    assert (card.name, card.memory_gb, card.tflops > 0) == (shown, memory, name != "L5")
    plan = plan_of(cluster=Cluster(2, 1, card, link_gbits=8.0))
    assert plan.fits(1) is True
    assert plan.at(1).step.network == pytest.approx(plan.at(1).network.sent / 1e9)
    assert (plan.at(1).step.optimizer > 0) == (name != "L5")


@pytest.mark.more
def test_time_of_a_step_on_a_cluster() -> None:
    """With a hundred times slower network, stage 1 waits for all traffic, and stage 3 for what is not hidden."""
    cluster = Cluster(2, 4, named_device("h100"), link_gbits=80.0)
    plan = plan_of(cluster=cluster, utilization=0.4, **{"train.batch_size": "64"})
    trainable = plan.parameters.trainable
    one = plan.at(1).step
    assert one.network == pytest.approx(
        (2 * 2 + 2) * trainable * 7 / 8 / 10e9
    )  # all-reduced and gathered in bf16, at 10 GB/s
    assert one.optimizer == pytest.approx(30 * trainable / 8 / 3350e9)
    assert one.compute == pytest.approx(plan.flops.total * plan.config.tokens_per_step / (8 * 0.4e12))
    assert one.hidden == 0
    assert one.total == one.compute + one.optimizer + one.network
    three = plan.at(3).step
    assert three.hidden == min(three.network, three.compute) > 0
    waiting = plan_of(
        cluster=cluster, **{"train.batch_size": "64", "train.deepspeed": "{zero_optimization: {overlap_comm: false}}"}
    )
    assert waiting.at(2).step.hidden == 0 < plan.at(2).step.hidden
    slow = plan_of(cluster=Cluster(2, 4, named_device("h100"), link_gbits=0.8), **{"train.batch_size": "64"})
    assert slow.at(1).step.network == pytest.approx(100 * one.network)
    assert slow.at(3).step.total == pytest.approx(slow.at(3).step.network + slow.at(3).step.optimizer)
    within = plan_of(cluster=Cluster(1, 8, named_device("h100")), **{"train.batch_size": "64"})
    assert within.at(1).step.network == pytest.approx(one.network * 10 / 450)
    assert plan.seconds == pytest.approx(1000 * plan.at(2).step.total)
    again = plan_of(cluster=cluster, **{"train.batch_size": "64", "model.activation_checkpointing": "true"})
    assert again.at(2).step.compute > 1.2 * plan.at(2).step.compute


@each(
    ("seconds", "text"),
    [
        (6.05, "6.0 s"),
        (306, "5 min 6 s"),
        (4 * 3600 + 300, "4 h 5 min"),
        (76 * 3600.0, "3 d 4 h"),
        (913 * 86400.0, "2.5 years"),
        (47 * 3600, "47 h 0 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.more
def test_ranks_on_one_host_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora_mora.experiments.planner.given.peak_flops", lambda **_: (1e12, "the test"))
    seconds = []
    for ranks in (1, 2):
        said = call(PLAN, "configs/run/tiny_remora.yaml", "--device=cpu", f"--world_size={ranks}", "--json")
        assert said.code == 0, said
        seconds.append(json.loads(said.out)["seconds"])
    assert seconds[0] == pytest.approx(seconds[1])


def test_remora_sends_only_trainable_parameters_below_stage_3() -> None:
    remora, full = plan_of(), plan_of(**{"method.name": "full"})
    assert remora.at(2).network.sent / full.at(2).network.sent == remora.parameters.trainable / remora.parameters.total
    assert remora.at(0).memory.optimizer < full.at(0).memory.optimizer
    assert full.at(0).memory.host_base == 0 < remora.at(0).memory.host_base
    wide = plan_of(**{"train.deepspeed": "{communication_data_type: fp32}"})
    assert wide.at(2).network.all_reduced == 2 * remora.at(2).network.all_reduced
    assert all(parameter.is_meta for parameter in remora.model.parameters()), "nothing is allocated"
