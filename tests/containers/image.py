"""The image, built and run for real: `make test-image`. Not collected by name: it takes minutes, root, and gigabytes of
disk.

Without an engine: a base image made by debootstrap, the Dockerfile built on it and its containers run with buildah.
Everything is in one folder, including what buildah would keep below /var. Isolation is chroot: it needs no namespaces
that a container on a test machine may not make, so processes see this machine's network and process numbers.
IMAGE_FOLDER keeps the images there and takes them from there the next time; BASE_IMAGE names a base image to pull
instead of the Debian that is made on the spot.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from relora_mora.config.load import dump
from tests.tools.helpers import ROOT
from tests.tools.runs import run_config, write_inputs

MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CANARY = "canary-of-the-builder.invalid"  # among pip's settings of the build: no trace of it may be in the image
BASE, IMAGE = "localhost/base", "localhost/relora_mora"
UID = 10001
NEEDED_GIB = 12


def skip_reason() -> str | None:
    """Why no image can be built here."""
    if os.geteuid() != 0:
        return "only root can run debootstrap and buildah's chroot isolation"
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install buildah debootstrap)"
    return None


pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=skip_reason() or "")


class Buildah:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("root", "runroot", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # buildah's defaults may be more than this machine allows
        files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        limits = f'"nofile={files}:{files}", "nproc={processes}:{processes}"'
        (self.folder / "containers.conf").write_text(f"[containers]\ndefault_ulimits = [{limits}]\n")

    def __call__(
        self, *arguments: object, check: bool = True, capture: bool = True
    ) -> subprocess.CompletedProcess[str]:
        place = [f"--root={self.folder / 'root'}", f"--runroot={self.folder / 'runroot'}"]
        variables = {"TMPDIR": str(self.folder / "tmp"), "BUILDAH_ISOLATION": "chroot"}
        variables["CONTAINERS_CONF"] = str(self.folder / "containers.conf")
        done = subprocess.run(
            ["buildah", *place, *map(str, arguments)],
            env=os.environ | variables,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
        )
        assert not check or done.returncode == 0, done.stdout
        return done

    def make_base(self) -> str:
        """The smallest Debian with Python and pip, which is what the Dockerfile asks of a base image.

        Its release is this machine's.
        """
        tree = self.folder / "tree"
        suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
        packages = "--include=python3,python3-pip,python3-venv,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", packages, suite, str(tree), MIRROR], check=True)
        container = self("from", "scratch").stdout.split()[-1]
        self("add", container, tree, "/")
        self("config", "--env=PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", container)
        self("commit", "--rm", container, BASE)
        shutil.rmtree(tree)
        return BASE

    def build(self, base: str) -> None:
        """Builds the image with this machine's settings of pip as a secret and its local files mounted."""
        settings = pip_settings()
        paths = [Path(path) for value in settings.values() for path in value.split()]
        mounts = [f"--volume={path}:{path}:ro" for path in paths if path.is_absolute() and path.exists()]
        pip_conf = self.folder / "pip.conf"
        lines = [f"{key} = {value}" for key, value in settings.items()]
        pip_conf.write_text("\n".join(["[global]", *lines, f"canary = {CANARY}", ""]))
        arguments = [
            f"--build-arg=BASE_IMAGE={base}",
            f"--build-arg=PIP_TRUSTED_HOST={CANARY}",
            f"--secret=id=pip.conf,src={pip_conf}",
        ]
        self("bud", "--format=docker", "--layers=false", *arguments, *mounts, f"--tag={IMAGE}", ROOT, capture=False)

    def config(self, image: str) -> dict[str, Any]:
        """Entrypoint, user, health check and the like of an image."""
        found: dict[str, Any] = json.loads(self("inspect", "--type=image", image).stdout)["Docker"]["config"]
        return found


def pip_settings() -> dict[str, str]:
    """What `pip config list` says, by name, without its sections."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [line.partition("=") for line in listed.splitlines()]
    return {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in found}


class Container(NamedTuple):
    """A container of an image with ``runs`` as its /app/runs."""

    buildah: Buildah
    name: str
    runs: Path

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command as the image's user, with its variables and in its folder."""
        return self.buildah("run", f"--volume={self.runs}:/app/runs", self.name, "--", *command, check=check)


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    """With the image built."""
    kept = os.environ.get("IMAGE_FOLDER")
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="relora-mora-image-"))
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free / 2**30) < NEEDED_GIB:
        pytest.skip(f"{folder} has {free:.0f} GiB free, the images need {NEEDED_GIB}")
    buildah = Buildah(folder)
    try:
        if buildah("inspect", "--type=image", IMAGE, check=False).returncode:
            buildah.build(os.environ.get("BASE_IMAGE") or buildah.make_base())
        yield buildah
    finally:
        if not kept:
            buildah("rm", "--all", check=False)
            shutil.rmtree(folder)


@pytest.fixture
def container(buildah: Buildah, tmp_path: Path) -> Iterator[Container]:
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, UID, UID)
    name = buildah("from", IMAGE).stdout.split()[-1]
    yield Container(buildah, name, runs)
    buildah("rm", name)


@pytest.fixture
def root_folder(buildah: Buildah, container: Container) -> Iterator[Path]:
    """The container's files."""
    yield Path(buildah("mount", container.name).stdout.strip())
    buildah("umount", container.name)


def test_the_entrypoint_is_the_trainer(container: Container) -> None:
    config = container.buildah.config(IMAGE)
    done = container.run(*config["Entrypoint"], *config["Cmd"])
    assert "Pretrains a model" in done.stdout
    assert "CONFIG" in done.stdout
    assert container.run(*config["Entrypoint"], "missing.yaml", check=False).returncode == 2


def test_the_user_is_not_root_and_the_kernels_are_compiled(container: Container) -> None:
    assert container.run("id", "-u").stdout.strip() == str(UID)
    output = container.run("python", "-c", "from relora_mora.kernels.ops import describe; print(describe())").stdout
    assert output.startswith("compiled, ")
    where = container.run("python", "-c", "import relora_mora; print(relora_mora.__file__)").stdout
    assert where.startswith("/opt/venv/")
    assert container.run("python", "-c", "import site; print(site.ENABLE_USER_SITE)").stdout.strip() == "False"


def test_no_settings_of_pip_are_left(buildah: Buildah, root_folder: Path) -> None:
    inspected = buildah("inspect", "--type=image", IMAGE).stdout
    secrets = (value for value in pip_settings().values() if "/" in value and not value.startswith("/etc/ssl/"))
    values = {CANARY, *secrets}
    assert not [value for value in values if value in inspected]
    patterns = [f"-e{value}" for value in values]
    places = [root_folder / place for place in ("app", "etc", "opt", "root", "tmp", "home")]
    found = subprocess.run(["grep", "-rlIF", *patterns, *places], capture_output=True, text=True)
    assert found.returncode == 1, found.stdout  # 1: nothing found, 2: could not look
    assert not (root_folder / "etc" / "pip.conf").exists()
    assert not list((root_folder / "root").glob(".cache/*"))


def test_it_trains_as_its_user_and_the_health_check_passes(
    container: Container, root_folder: Path, tokenizer_path: str
) -> None:
    config = container.buildah.config(IMAGE)
    kind, *health = config["Healthcheck"]["Test"]
    assert kind == "CMD"
    inputs = write_inputs(container.runs / "inputs")
    shutil.copytree(tokenizer_path, container.runs / "tokenizer")
    settings = run_config(inputs, "runs/tokenizer", container.runs / "tiny", log={"tensorboard": True})
    (container.runs / "tiny.yaml").write_text(dump(settings).replace(f"{container.runs}/", "runs/"))
    for path in container.runs.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert container.run(*health, check=False).returncode == 1
    done = container.run(*config["Entrypoint"], "runs/tiny.yaml")
    assert "compiled" in done.stdout and "done: 10 steps" in done.stdout, done.stdout
    lines = [json.loads(line) for line in (container.runs / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 11))
    assert {path.stat().st_uid for path in (container.runs / "tiny").rglob("*")} == {UID}
    assert container.run(*health).returncode == 0
    # with a read-only file system it works too: nothing was written outside the mounts
    written = [path for path in _owned(root_folder) if not path.is_relative_to(root_folder / "tmp")]
    assert not [path for path in written if path != root_folder / "app" / "runs"]


def _owned(folder: Path) -> list[Path]:
    found = subprocess.run(["find", folder, "-xdev", "-uid", str(UID)], capture_output=True, text=True, check=True)
    return [Path(line) for line in found.stdout.splitlines()]
