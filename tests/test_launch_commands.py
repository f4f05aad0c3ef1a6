"""Every command line in the documents that starts training: its config suits its number of ranks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.documents import INSTRUCTIONS, blocks, name
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
    kinds = (
        "sbatch",
        "DS_ACCELERATOR=cpu sbatch",
        "torchrun",
        "deepspeed --num",
        "deepspeed --host",
        "relora-mora pretrain",
        "GPUS=",
        "docker run",
    )
    assert all(any(command.startswith(kind) for _, command in LAUNCHES) for kind in kinds)
    where = {path for path, _ in LAUNCHES}
    assert where >= {
        "README.md",
        "docs/clusters.md",
        "launch/slurm/pretrain.sbatch",
        "compose.yaml",
    }
    found = {command: ranks_of(command) for _, command in LAUNCHES}
    assert {1, 2, 4, 8, 32} <= set(found.values()) and None not in found.values(), "say how many"


@pytest.mark.parametrize("path,command", LAUNCHES)
def test_the_config_of_a_launch_suits_its_number_of_ranks(
    path: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relora_mora.config.load import load_config

    monkeypatch.chdir(ROOT)
    [config] = re.findall(r"configs/run/\S+?\.yaml", command)
    words = shlex.split(
        command.replace('CONFIG="', "").replace('" docker', " docker").replace("$SLURM_ARRAY_TASK_ID", "1")
    )
    overrides = dict(word.removeprefix("--").split("=", 1) for word in words if re.match(r"--[a-z_]+\.", word))
    for each in ROOT.glob(re.sub(r"\$\w+", "*", config)):
        load_config(each, overrides, world_size=ranks_of(command))


def test_a_launch_that_would_be_refused_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (
        "sbatch --nodes=1 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm/pretrain.sbatch "
        "configs/run/tiny_remora.yaml",
        "sbatch --array=0-2 launch/slurm/pretrain.sbatch configs/run/tiny_remora.yaml "
        "--train.seed='$SLURM_ARRAY_TASK_ID'",
        "torchrun --nnodes=2 --nproc_per_node=2 launch/pretrain.py configs/run/tiny_remora.yaml",
        "GPUS=4 CONFIG=configs/run/tiny_remora.yaml docker compose up",
    ):
        with pytest.raises(ValueError, match="ranks"):
            test_the_config_of_a_launch_suits_its_number_of_ranks("", command, monkeypatch)
