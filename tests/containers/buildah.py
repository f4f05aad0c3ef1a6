"""Images without an engine: a base image made by debootstrap, the Dockerfile built on it and its containers run with
buildah, as root.

Everything is in one folder, including what buildah would keep below /var. Isolation is chroot: it needs no namespaces
that a container on a test machine may not make, so processes see this machine's network and process numbers.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tools.helpers import ROOT

MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CANARY = "canary-of-the-builder.invalid"  # among pip's settings of the build: no trace of it may be in the image
BASE, IMAGE = "localhost/base", "localhost/relora_mora"


@dataclass
class Buildah:
    folder: Path

    def __post_init__(self) -> None:
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

        Its release and its Python are this machine's, so that wheels which pip finds here fit: Debian's Python if
        that runs here, otherwise a copy of the running Python in a separate folder, as conda has it.
        """
        tree, packages, debians = self.folder / "tree", "python3,ca-certificates", sys.base_prefix == "/usr"
        suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
        packages += ",python3-pip,python3-venv" if debians else ""
        options = ["--variant=minbase", f"--include={packages}"]
        subprocess.run(["debootstrap", *options, suite, str(tree), MIRROR], check=True)
        if not debians:
            unneeded = shutil.ignore_patterns("site-packages", "test", "__pycache__")
            shutil.copytree(sys.base_prefix, tree / "opt" / "python", symlinks=True, ignore=unneeded)
            (tree / "etc" / "ld.so.conf.d" / "python.conf").write_text("/opt/python/lib\n")
        container = self("from", "scratch").stdout.split()[-1]
        self("add", container, tree, "/")
        path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self("config", f"--env=PATH={'' if debians else '/opt/python/bin:'}{path}", container)
        if not debians:
            self("run", container, "--", "sh", "-c", "ldconfig && python3 -m ensurepip")
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


def skip_reason() -> str | None:
    """Why no image can be built here."""
    if os.geteuid() != 0:
        return "only root can run debootstrap and buildah's chroot isolation"
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install buildah debootstrap)"
    return None


def pip_settings() -> dict[str, str]:
    """What `pip config list` says, by name, without its sections."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [line.partition("=") for line in listed.splitlines()]
    return {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in found}
