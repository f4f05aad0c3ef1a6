"""What can be said about the image and the compose file without building them."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT
from tests.jobs import BIN

SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def checked(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / tool), *map(str, arguments)], capture_output=True, text=True, check=False)


def follows_the_compose_specification(path: Path) -> subprocess.CompletedProcess[str]:
    return checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def test_the_dockerfile_is_clean(tmp_path: Path) -> None:
    done = checked("hadolint", ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN apt-get install gcc\n")
    assert "DL3006" in checked("hadolint", tmp_path / "Dockerfile").stdout


def test_the_compose_file_follows_the_specification(tmp_path: Path) -> None:
    done = follows_the_compose_specification(ROOT / "compose.yaml")
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((ROOT / "compose.yaml").read_text().replace("stop_grace_period", "stop_grace_periode"))
    done = follows_the_compose_specification(wrong)
    assert done.returncode == 1 and "stop_grace_periode" in done.stdout


def test_the_base_image_is_pinned_and_a_build_argument() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"pytorch/pytorch:\d+\.\d+\.\d+-cuda[\w.]+-cudnn\d+-runtime", base)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE_IMAGE}"] * 2
    assert not re.search(r"^(?:ARG|ENV) PIP_\w+=", text, re.MULTILINE)  # arguments without values: settings are the builder's


@pytest.mark.parametrize("name", SERVICES)
def test_services_run_as_a_user_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "${TRAINER_UID:-10001}:${TRAINER_GID:-10001}"
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]


def test_the_health_check_sees_a_run_that_writes_metrics_and_no_other(tmp_path: Path) -> None:
    """The command of the Dockerfile, in a folder of this machine."""
    found = re.search(r'^    CMD \["sh", "-c", "(.+)"\]$', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    command = found[1].replace('\\"', '"')

    def healthy() -> bool:
        return subprocess.run(["sh", "-c", command], cwd=tmp_path, env={"HEALTH_MINUTES": "30", "PATH": "/usr/bin:/bin"}).returncode == 0

    run = tmp_path / "runs" / "deep" / "run"
    run.mkdir(parents=True)
    assert not healthy()
    (run / "metrics.jsonl").write_text("{}\n")
    assert healthy()
    os.utime(run / "metrics.jsonl", (0, time.time() - 3600))
    assert not healthy()
