"""Every command line in the documents that starts training: its config suits its number of ranks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from relora_mora.config.load import load_config
from tests.tools.documents import INSTRUCTIONS, blocks, name
from tests.tools.each import each
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more


def launches(path: Path) -> Iterator[str]:
    """Command lines that train one of the shipped configs: of code blocks, of code within a line, and of comments."""
    text = path.read_text()
    if path.suffix == ".md":
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        found = [*blocks(text), *(code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose))]
    else:
        found = ["\n".join(re.findall(r"^#   +(.+)$", text, re.MULTILINE))]
    starts_one = re.compile(
        r"(?=.*configs/run/\S+\.yaml)"
        r".*(?:launch/pretrain\.py|relora-mora pretrain|pretrain\.sbatch|docker (?:run|compose))"
    )
    for block in found:
        for line in re.sub(r"\\\n *", "", block).splitlines():
            command = re.split(r" {2,}#|; done", line)[0].strip()
            if starts_one.match(command):
                yield command


def ranks_of(command: str) -> int | None:
    """How many ranks a command line starts; None if it takes all GPUs."""
    given = {option: int(number) for option, number in re.findall(r"(?:--|\b)([\w-]+)[= ](\d+)\b", command)}
    if "sbatch" in command:
        text = (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text()
        shipped = {
            option: int(number) for option, number in re.findall(r"^#SBATCH --([a-z-]+)=(\d+)$", text, re.MULTILINE)
        }
        job = shipped | given
        assert job["gpus-per-node"] in (0, job["ntasks-per-node"]), command
        return job["nodes"] * job["ntasks-per-node"]
    if "--hostfile" in command:
        hosts = (ROOT / "launch" / "hostfile.example").read_text()
        return sum(int(slots) for slots in re.findall(r"^\S+ slots=(\d+)", hosts, re.MULTILINE))
    if "deepspeed" in command:
        return given.get("num_gpus")
    if "torchrun" in command:
        return given.get("nnodes", 1) * given["nproc_per_node"]
    if "docker compose" in command and "trainer-cpu" not in command:
        return given.get("GPUS", 1)
    return 1


LAUNCHES = sorted(
    {(name(path), command) for path in [*INSTRUCTIONS, *ROOT.glob("configs/run/*.yaml")] for command in launches(path)}
    - {("README.md", command) for command in launches(ROOT / "README.md") if "merge_evry" in command}
)


def test_launches_of_every_kind_are_found() -> None:
    kinds = ("DS_ACCELERATOR=cpu sbatch", "torchrun", "deepspeed --host", "relora-mora pretrain", "GPUS=", "docker run")
    assert all(any(command.startswith(kind) for _, command in LAUNCHES) for kind in kinds)
    ranks = {ranks_of(command) for _, command in LAUNCHES}
    assert {1, 2, 4, 8, 32} <= ranks and None not in ranks, "say how many"


@each("document,command", LAUNCHES)
@pytest.mark.usefixtures("at_root")
def test_the_config_of_a_launch_suits_its_number_of_ranks(document: str, command: str) -> None:
    [config] = re.findall(r"configs/run/\S+?\.yaml", command)
    words = shlex.split(
        command.replace('CONFIG="', "").replace('" docker', " docker").replace("$SLURM_ARRAY_TASK_ID", "1")
    )
    overrides = dict(word.removeprefix("--").split("=", 1) for word in words if re.match(r"--[a-z_]+\.", word))
    for path in ROOT.glob(re.sub(r"\$\w+", "*", config)):
        load_config(path, overrides, world_size=ranks_of(command))
