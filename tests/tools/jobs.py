"""Jobs as users start them: launchers, ranks as processes of their own, signals and kills."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from relora_mora.config.load import dump
from relora_mora.config.schema import Config
from relora_mora.system.run_folder import RunFolder, read_json_lines
from tests.tools.helpers import ROOT, python_path, wait_until
from tests.tools.ports import free_port

BIN = Path(sys.executable).parent
PACED = ROOT / "tests" / "tools" / "changed_run.py"
PATIENCE = 300.0  # seconds; on a busy machine, only the imports of a rank take 75
_JOB = "JOB_OF_A_TEST"  # a variable that everything in a job inherits
_OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _script(name: str) -> list[str]:
    """A launcher's command; packages outside the environment install no script."""
    module = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}[name]
    return [str(BIN / name)] if (BIN / name).exists() else [sys.executable, "-m", module]


def command_of(process: psutil.Process) -> list[str]:
    """The command line of a process; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def lives(process: psutil.Process) -> bool:
    """Whether a process runs and is not a zombie; it may end at any moment."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def write_config(config: Config, path: Path) -> Path:
    path.write_text(dump(config))
    return path


class Started:
    """A command that runs in a folder, the checkout by default, with its output in a file."""

    def __init__(self, log: Path, command: list[str], environment: dict[str, str], folder: Path = ROOT) -> None:
        self.log = log
        where: dict[str, Any] = {"cwd": folder, "env": environment, "start_new_session": True}
        with log.open("ab") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, **streams, **where)
        RUNNING.append(self)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, true: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """What ``true()`` is as soon as it is true, which must be before the end of the command."""

        def seen() -> Any:
            has_ended = self.process.poll() is not None
            value = true()
            assert value or not has_ended, f"the command ended with {self.process.returncode}\n{self.output}"
            return value

        return wait_until(seen, seconds, lambda: self.output)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        self.wait_until(lambda: last_step(run_dir) >= step)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code, when it ends in time."""
        self.wait_until(lambda: self.process.poll() is not None, seconds)
        return self.process.returncode

    def kill(self) -> None:
        """Ends everything in its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Job(Started):
    """A run of launch/pretrain.py with pauses, or of ``script``, on ``ranks`` processes, by deepspeed or torchrun."""

    def __init__(
        self,
        config: Path,
        *arguments: str,
        launcher: str = "deepspeed",
        ranks: int = 2,
        script: Path | None = None,
        port: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.port = port or free_port()
        ranks_option = {"deepspeed": f"--num_gpus={ranks}", "torchrun": f"--nproc_per_node={ranks}"}[launcher]
        front = [*_script(launcher), ranks_option, f"--master_port={self.port}"]
        kept = {key: value for key, value in os.environ.items() if key not in _OF_A_JOB}
        given = {"DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
        log = config.with_suffix(f".{time.monotonic_ns()}.log")
        given[_JOB] = log.name
        super().__init__(log, [*front, str(script or PACED), str(config), *arguments], kept | given)

    def processes(self) -> list[psutil.Process]:
        """Everything of this job that lives, also what has lost its parent, in the order of their starts."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_JOB) == self.log.name and lives(process):
                    found.append(process)
        return sorted(found, key=psutil.Process.create_time)

    def rank(self, number: int) -> psutil.Process:
        process = self.find_rank(number)
        assert process is not None, f"rank {number} does not run\n{self.output}"
        return process

    def find_rank(self, number: int) -> psutil.Process | None:
        """None before it is started and after its end."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                of_rank = process.environ().get("RANK") == str(number)
                if of_rank and "relora_mora.data.stream.worker" not in command_of(process):
                    return process
        return None

    def launch_py(self) -> psutil.Process:
        found = [each for each in self.processes() if "deepspeed.launcher.launch" in command_of(each)]
        assert found, f"launch.py does not run\n{self.output}"
        return found[0]

    def wait_for_nobody(self, seconds: float) -> None:
        """Until no process of the job lives."""
        wait_until(lambda: not self.processes(), seconds, lambda: f"{self.processes()} live\n{self.output}")

    def kill(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


RUNNING: list[Started] = []


def kill_all() -> None:
    """Ends all commands that a test left."""
    while RUNNING:
        RUNNING.pop().kill()


def last_step(run_dir: Path) -> int:
    try:
        steps = re.findall(r'^\{"step": (\d+),', RunFolder(run_dir).metrics.read_text(), re.M)
    except OSError:
        return -1
    return int(steps[-1]) if steps else -1


def ends(run_dir: Path) -> list[dict[str, Any]]:
    return read_json_lines(RunFolder(run_dir).ends)


def checkpoints(run_dir: Path) -> list[str]:
    """Names below checkpoints/, newest last."""
    return sorted(path.name for path in RunFolder(run_dir).checkpoints.iterdir())
