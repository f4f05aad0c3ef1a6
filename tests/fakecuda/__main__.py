"""Runs a command of a Python that has a CUDA build of torch and thinks that there is an H100; needs no GPU.

    python -m tests.fakecuda ENVIRONMENT [-m pytest ...]

The environment, 5.3 GB, is made at the first call, which takes two minutes with a fast download. If it cannot
be made, the command is not run; the last line says "skipped" and why, and the exit code is 0.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tools.helpers import ROOT

SOURCE = Path(__file__).with_name("device.c")
# ===: the build with exactly this version in the index, which is for CUDA; never 2.13.0+cpu
PACKAGES = [["torch===2.13.0"], ["--editable", str(ROOT), "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100"]]
GIGABYTES = 9  # with what pip unpacks on its way


def main(folder: Path, command: list[str]) -> int:
    python = folder / "bin/python"
    finished = folder / ".installed"
    library = folder / "cuda/libcuda.so.1"
    wanted = f"{PACKAGES}\n{(ROOT / 'setup.cfg').read_text()}"
    installed = finished.is_file() and finished.read_text() == wanted
    reason = obstacle(folder, installed=installed) or (None if installed else install(folder, python))
    if reason:
        print(f"skipped: {reason}")
        return 0
    finished.write_text(wanted)
    build(python, library)
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run([python, *command], env=environment, check=False).returncode


def obstacle(folder: Path, *, installed: bool) -> str | None:
    """Why the environment cannot be on this machine, None if it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return (
            f"torch for CUDA is installed on Linux on x86-64 here, and this is {sys.platform} on {platform.machine()}"
        )
    if shutil.which("gcc") is None:
        return "the stand-in for CUDA is compiled with gcc, and there is none"
    free = shutil.disk_usage(folder.parent).free / 1e9
    if not installed and free < GIGABYTES:
        return f"a CUDA build of torch needs {GIGABYTES} GB in {folder.parent}, and {free:.1f} are free"
    return None


def install(folder: Path, python: Path) -> str | None:
    """Makes the environment; returns pip's output if it failed."""
    print(f"installing a CUDA build of torch into {folder} (5.3 GB, minutes, the first time)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for packages in PACKAGES:
        pip = [python, "-m", "pip", "install", "--quiet", *packages]
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            return f"pip cannot install {packages[0]}: {' '.join(errors[:1]) or done.stderr.strip()}"
    return None


def build(python: Path, library: Path) -> None:
    """Compiles the stand-in for CUDA with the headers of torch's runtime, and the headers of Triton that these need."""
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    library.parent.mkdir(exist_ok=True)
    include = [f"-I{packages}/{path}/include" for path in ("nvidia/cu13", "triton/backends/nvidia")]
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *include]
    subprocess.run(["gcc", *options, SOURCE, "-o", library], check=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
