"""Checks of the image and the compose file that need no build."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.tools.each import each
from tests.tools.helpers import ROOT
from tests.tools.jobs import BIN

pytestmark = pytest.mark.more

SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_base_image_is_pinned_and_a_build_argument() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"pytorch/pytorch:\d+\.\d+\.\d+-cuda[\w.]+-cudnn\d+-runtime", base)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE_IMAGE}"] * 2
    assert not re.search(
        r"^(?:ARG|ENV) PIP_\w+=", text, re.MULTILINE
    )  # arguments without values: settings are the builder's


@each("name", SERVICES)
def test_services_run_as_a_user_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "${TRAINER_UID:-10001}:${TRAINER_GID:-10001}"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ()))  # only from this machine


def test_packages_of_the_image_come_before_those_in_a_home_folder() -> None:
    """apptainer mounts the home, and the image's environment of Python sees site-packages outside of it."""
    final = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert "--system-site-packages" in (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ENV (?:.*\\\n)*.*\bPYTHONNOUSERSITE=1\b", final, re.MULTILINE)


@each(
    "cuda,headers,installed",
    [("None", True, ""), ("'13.0'", True, "gcc libc6-dev"), ("'13.0'", False, "gcc libc6-dev python3-dev")],
)
def test_an_image_for_gpus_has_the_compiler_that_triton_needs(
    tmp_path: Path, cuda: str, headers: bool, installed: str
) -> None:
    """The command of the Dockerfile, with torch, Python's headers and apt-get as the test wants them."""
    final = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    found = re.search(r"^RUN (if python (?:.*\\\n)*.*)$", final, re.MULTILINE)
    assert found is not None
    command = found[1].replace("\\\n", "").replace("/var/lib/apt/lists", str(tmp_path / "lists"))
    (tmp_path / "include").mkdir()
    if headers:
        (tmp_path / "include" / "Python.h").touch()
    (tmp_path / "torch.py").write_text(f"class version:\n    cuda = {cuda}\n")
    (tmp_path / "sysconfig.py").write_text(f"def get_path(name):\n    return {str(tmp_path / 'include')!r}\n")
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "apt-get").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    subprocess.run(["sh", "-c", command], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert calls == (["update", f"install -y --no-install-recommends {installed}"] if installed else [])


def as_compose_says(text: str, **variables: str) -> str:
    """``${NAME:-default}`` replaced."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], text)


@each(
    "given,ranks,called",
    [
        ({}, 1, "configs/run/tiny_remora.yaml"),
        ({"GPUS": "2", "CONFIG": "configs/run/demo.yaml --train.seed=2"}, 2, "configs/run/demo.yaml --train.seed=2"),
    ],
)
def test_the_trainer_of_the_compose_file_starts_a_rank_on_each_gpu(
    tmp_path: Path, given: dict[str, str], ranks: int, called: str
) -> None:
    """And ends with their code: its process is not a launcher, which would kill them half a minute after SIGTERM."""
    service = SERVICES["trainer"]
    (tmp_path / "python").write_text('#!/bin/bash\necho "rank $RANK of $WORLD_SIZE:" "$@"\nexit 75\n')
    (tmp_path / "python").chmod(0o755)
    environment = {name: as_compose_says(value, **given) for name, value in service["environment"].items()}
    command = [*service["entrypoint"], *shlex.split(as_compose_says(service["command"], **given))]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        command, env=environment | path, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert sorted(done.stdout.splitlines()) == [
        f"rank {n} of {ranks}: launch/pretrain.py {called}" for n in range(ranks)
    ]
    assert done.returncode == 75
    assert service["stop_grace_period"] == "5m"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert as_compose_says(device["count"], **given) == str(ranks)


def test_the_health_check_passes_only_if_a_run_writes_metrics(tmp_path: Path) -> None:
    """The command of the Dockerfile, in a folder of this machine."""
    found = re.search(r'^    CMD \["sh", "-c", "(.+)"\]$', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    command = found[1].replace('\\"', '"')

    def healthy() -> bool:
        environment = {"HEALTH_MINUTES": "30", "PATH": "/usr/bin:/bin"}
        return subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment).returncode == 0

    run = tmp_path / "runs" / "deep" / "run"
    run.mkdir(parents=True)
    assert not healthy()
    (run / "metrics.jsonl").write_text("{}\n")
    assert healthy()
    os.utime(run / "metrics.jsonl", (0, time.time() - 3600))
    assert not healthy()


def test_the_image_copies_only_files_that_the_build_gets() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert "*" in ignored
    assert sources == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
