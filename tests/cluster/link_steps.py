"""One rank of slow_links.py: steps of several methods, in turns, over links of several speeds. Prints a line of JSON on
rank 0."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relora_mora.config.schema import ModelConfig
from relora_mora.distributed.collectives import sum_over_hosts
from relora_mora.engine.start import init_distributed
from relora_mora.model.config import read_model_config
from relora_mora.optim.groups import group_rates
from relora_mora.system.hardware import fast_bf16
from tests.tools.tiny import Rig, build_rig, tiny_config

SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
DELAY = "500us"  # each way
WARMUP = 2


def shape(rate: str) -> str:
    """Limits what this host sends; returns how. netem is missing from some kernels, and tbf knows no delay."""
    subprocess.run(["tc", "qdisc", "delete", "dev", "eth0", "root"], capture_output=True)
    if rate == "none":
        return "none"
    ways = {
        f"netem, {DELAY}": ["netem", "rate", rate, "delay", DELAY, "limit", "100000"],
        "tbf": ["tbf", "rate", rate, "burst", "128kb", "latency", "100ms"],
    }
    for way, arguments in ways.items():
        command = ["tc", "qdisc", "add", "dev", "eth0", "root", *arguments]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return way
    raise SystemExit("tc can neither netem nor tbf on this kernel")


def build(
    plan: dict[str, Any], method: str, deepspeed: dict[str, Any] | None = None, overrides: dict[str, Any] | None = None
) -> Rig:
    config = tiny_config(
        2,
        method={"name": method, **({} if method == "full" else {"rank": plan["rank"]})},
        data={"sequence_length": plan["length"]},
        train={
            "batch_size": 2 * plan["sequences"],
            "micro_batch_size": plan["sequences"],
            "precision": "auto",
            "zero_stage": plan["stage"],
            "deepspeed": deepspeed or {},
        },
    )
    model = ModelConfig(config=plan["model"], overrides=plan["overrides"] | (overrides or {}))
    return build_rig(config, bf16=fast_bf16(), llama=read_model_config(model))


def step(rig: Rig, ids: Tensor, labels: Tensor) -> None:
    loss = rig.engine(ids, labels)
    rig.engine.accumulate(loss, last=True)
    rig.engine.step(group_rates(rig.schedule, rig.groups, 2), loss)


def main(given: str) -> None:
    plan = json.loads(given)
    rank, _ = init_distributed()
    built = {name: build(plan, **changes) for name, changes in plan["variants"].items()}
    vocabulary = next(iter(built.values())).engine.lm.config.vocab_size
    tokens = torch.randint(
        0, vocabulary, (plan["sequences"], plan["length"] + 1), generator=torch.Generator().manual_seed(rank)
    )
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for rig in built.values():
        for _ in range(WARMUP):
            step(rig, *batch)
    rows = []
    for rate, repeats in plan["rates"].items():
        way = shape(rate)
        seconds: dict[str, list[float]] = {name: [] for name in built}
        sent: dict[str, list[int]] = {name: [] for name in built}
        for _ in range(repeats):
            for name, rig in built.items():
                sum_over_hosts([0.0])  # all begin together
                bytes_before, begin = int(SENT.read_text()), time.perf_counter()
                step(rig, *batch)
                sum_over_hosts([0.0])
                seconds[name].append(time.perf_counter() - begin)
                sent[name].append(int(SENT.read_text()) - bytes_before)
        for name, rig in built.items():
            trainable = sum(p.numel() for p in rig.engine.lm.parameters() if p.requires_grad)
            row = {"variant": name, "rate": rate, "way": way, "trainable": trainable}
            rows.append(row | {"seconds": seconds[name], "sent": sent[name]})
    shape("none")
    if rank == 0:
        print(json.dumps({"bf16": fast_bf16(), "stage": plan["stage"], "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1])
