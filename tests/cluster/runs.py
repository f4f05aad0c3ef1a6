"""Runs on the two hosts: one configuration that every launcher trains, and what it ended with."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from tests.cluster.hosts import Host
from tests.tools.helpers import ROOT
from tests.tools.jobs import BIN, Started, write_config
from tests.tools.runs import checkpoint_at, logged_steps, metrics, run_config, tensors

STEPS, MERGES, SAVE_EVERY = 75, [30, 60], 10
PRETRAIN = "launch/pretrain.py"
# what a user of CPUs sets, and where a script finds this checkout; a login sets the rest
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def write_run(folder: Path, inputs: Path, tokenizer: str, stage: int = 2, **train: Any) -> Path:
    """The run's YAML file; it trains in ``folder / "run"``."""
    config = run_config(
        inputs,
        tokenizer,
        folder / "run",
        2,
        method={"merge_every": MERGES[0]},
        train={"steps": STEPS, "zero_stage": stage, **train},
        data={"workers": 1},
        eval={"at_start": False, "every_steps": 50, "max_tokens": 300},
        checkpoint={"every_steps": SAVE_EVERY, "keep_last": 2},
    )
    return write_config(config, folder / "run.yaml")


class Command(Started):
    """A command of a user on one of the hosts, in the checkout, with its output in a file."""

    def __init__(self, host: Host, log: Path, *command: str, **environment: str) -> None:
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        inside = host.inside("env", f"--chdir={ROOT}", *command)
        super().__init__(log, inside, kept | ENVIRONMENT | environment)


def deepspeed(host: Host, config: Path, home: Path) -> Command:
    """A run with a rank on each host, by a user with this home folder."""
    (home / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (home / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    user = {"HOME": str(home), "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"}
    words = (str(BIN / "deepspeed"), f"--hostfile={home / 'hostfile'}", PRETRAIN, str(config))
    return Command(host, config.parent / "deepspeed.log", *words, **user)


def torchrun(host: Host, config: Path, *options: str) -> Command:
    """What one host starts; without options, of a job of two."""
    both = (
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=node1:29500",
        "--rdzv_id=remora",
    )
    log = config.parent / f"torchrun.{host.name}.log"
    return Command(host, log, str(BIN / "torchrun"), *(options or both), PRETRAIN, str(config))


def on_one_host(host: Host, config: Path, ranks: int) -> Command:
    return torchrun(host, config, "--master_port=29501", f"--nproc_per_node={ranks}")


def starts(run_dir: Path) -> list[int]:
    """The step that each start of a run began at."""
    return [json.loads(line)["step"] for line in (run_dir / "starts.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """The losses of a run, which must have one line for each step."""
    lines = [line for line in metrics(run_dir) if "train/loss" in line]  # once: the run may still write
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["train/loss"] for line in lines]


def same_end(first: Path, second: Path) -> bool:
    """Two whole runs: equal losses, merges, and bits of weights and optimizer."""
    for run_dir in (first, second):
        assert logged_steps(run_dir, "merge/layers") == MERGES
        assert len(losses(run_dir)) == STEPS
    kept = [tensors(checkpoint_at(run_dir, STEPS)) for run_dir in (first, second)]
    assert set(kept[0]) == set(kept[1])
    assert len(kept[0]) > 50
    return losses(first) == losses(second) and all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
