"""The wheel in an empty environment and an empty folder, without the sources in reach: make test-package.

WHEEL_ENVIRONMENT names an environment to use again instead of a new one.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relora_mora import __version__
from relora_mora.commands import NAMES
from relora_mora.supervise.exits import REQUEUE
from relora_mora.system.run_folder import RunFolder, read_json_lines
from tests.tools.helpers import ROOT
from tests.tools.jobs import Started
from tests.tools.ports import free_port

TEXT = "--data=runs/demo/data/validation/*"
SHORT = ["--train.steps=12", "--optim.warmup_steps=2", "--method.merge_every=4", "--log.every_steps=1"]
SHORT += ["--eval.every_steps=6", "--eval.max_tokens=2048"]


class Installed:
    """An environment with the wheel, and the empty folder in which its commands are started."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.bin = environment / "bin"
        self.folder = folder
        outside = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        self.environment = {name: value for name, value in os.environ.items() if name not in outside}
        self.environment |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
        self.environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def start(self, program: str, *arguments: str) -> Started:
        log = self.folder.parent / f"{time.monotonic_ns()}.log"
        return Started(log, [str(self.bin / program), *arguments], self.environment, self.folder)

    def run(self, program: str, *arguments: str) -> str:
        """The output of a program that must end with 0."""
        started = self.start(program, *arguments)
        assert started.wait(1200) == 0, started.output
        return started.output

    def losses(self, run: str) -> dict[int, float]:
        lines = read_json_lines(RunFolder(self.folder / run).metrics)
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = Path(os.environ.get("WHEEL_ENVIRONMENT") or tmp_path_factory.mktemp("installed") / "venv")
    [wheel] = (ROOT / "dist").glob("*.whl")
    begin = time.monotonic()
    options = ["--force-reinstall", "--no-deps"] if environment.exists() else []
    if not environment.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin" / "pip", "install", "--quiet", *options, wheel], check=True)
    print(f"\ninstalled {wheel.name} and its dependencies in {time.monotonic() - begin:.0f} s")
    return Installed(environment, tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def demo(installed: Installed) -> str:
    """The output of a shortened demo, whose text and tokenizer the shipped settings read."""
    return installed.run("relora-mora", "demo", *SHORT)


def test_the_package_its_kernels_commands_and_configs_come_from_the_wheel(installed: Installed) -> None:
    code = "from relora_mora.kernels import cpu as k; assert k.available(), k.describe(); print(k.__file__)"
    assert Path(installed.run("python", "-c", code).strip()).is_relative_to(installed.bin.parent)
    assert installed.run("relora-mora", "--version") == f"relora-mora {__version__}\n"
    for name in NAMES:
        assert f"Usage: relora-mora {name}" in installed.run("relora-mora", name, "--help")
    assert "tiny_remora" in installed.run("relora-mora", "configs")
    installed.run("relora-mora", "configs", "copy", "tiny_remora", "mine.yaml")
    installed.run("relora-mora", "plan", "mine.yaml")


def test_the_demo_goes_to_its_end(installed: Installed, demo: str) -> None:
    assert "2 merges, after steps 4 to 8" in demo
    assert (installed.folder / "runs/demo/export/config.json").is_file()
    assert "perplexity" in installed.run("relora-mora", "evaluate", "runs/demo/export", TEXT)


@pytest.mark.usefixtures("demo")
def test_a_stopped_run_goes_on(installed: Installed) -> None:
    words = ["pretrain", "tiny_remora", *SHORT]
    started = installed.start("relora-mora", *words, "--train.run_dir=runs/mine")
    started.wait_for_step(installed.folder / "runs/mine", 1)
    started.process.send_signal(signal.SIGINT)
    assert started.wait() == REQUEUE, started.output
    stopped = max(installed.losses("runs/mine"))
    assert stopped < 12
    installed.run("relora-mora", *words, "--train.run_dir=runs/mine")
    assert list(installed.losses("runs/mine")) == list(range(1, 13))


@pytest.mark.usefixtures("demo")
def test_launchers_start_the_same_run(installed: Installed) -> None:
    words = ["relora_mora", "pretrain", "tiny_remora", *SHORT]
    port = f"--master_port={free_port()}"
    installed.run("deepspeed", "--num_gpus=2", port, "--module", *words, "--train.run_dir=runs/deepspeed")
    installed.run("torchrun", "--standalone", "--nproc_per_node=2", "--module", *words, "--train.run_dir=runs/torchrun")
    assert installed.losses("runs/deepspeed") == installed.losses("runs/torchrun")
    assert max(installed.losses("runs/deepspeed")) == 12


def test_the_example_of_a_loop_runs(installed: Installed) -> None:
    shutil.copy(ROOT / "examples" / "plain_loop.py", installed.folder)
    assert "the merged model has the same output" in installed.run("python", "plain_loop.py")
