"""Two hosts on this machine: namespaces with a network, a hostname, processes and an sshd of their own.

Each host is a process tree below ``unshare``, which is bound to this process: when it ends, however it does, the kernel
ends every process of the hosts, and the namespaces and the link between them go with the last one. Nothing of this
machine is changed: what a host needs in /etc, /run and /dev/shm is mounted over in its own mount namespace.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from tests.tools.helpers import wait_until
from tests.tools.jobs import command_of, lives

NAMES = ("node1", "node2")
NEEDED = ("unshare", "nsenter", "setpriv", "mount", "ip", "sshd", "ssh-keygen", "pdsh")
_OF_A_RUN = ("launch/pretrain.py", "changed_run.py", "relora_mora.data.stream.worker", "deepspeed", "torchrun")
_NAMESPACES = "unshare --net --uts --mount --pid --fork"
_BOOT = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount -t sysfs sysfs /sys
mkdir -p /run/sshd
mount --bind "$0/hosts" /etc/hosts
mount --bind "$0/ssh_config" /etc/ssh/ssh_config
hostname "$1"
ip link set lo up
touch "$0/$1.up"
while sleep 3600; do :; done
"""
_SSH = """Host node*
    IdentityFile {0}/key
    IdentitiesOnly yes
    UserKnownHostsFile {0}/known_hosts
    ConnectTimeout 10
"""
_SSHD = """HostKey {0}/key
AuthorizedKeysFile {0}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PrintMotd no
"""


def why_not(*commands: str) -> str | None:
    """What keeps this machine from being two hosts; None when nothing does."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    if missing := [command for command in (*NEEDED, *commands) if shutil.which(command) is None]:
        return f"not installed: {', '.join(missing)} (.ci/run installs the packages)"
    tried = subprocess.run([*_NAMESPACES.split(), "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def skip(reason: str) -> NoReturn:
    """Skips the test; with NEED_CLUSTER=1 it fails instead, so that a machine that is to run these tests cannot leave
    all of them out."""
    if os.environ.get("NEED_CLUSTER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class Host:
    """One of the two hosts. ``init`` is the process that all others of it descend from."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._unshare = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "--", *_NAMESPACES.split(), "--kill-child", "--mount-proc"),
                *("--", "bash", "-c", _BOOT, str(folder), name),
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: (folder / f"{name}.up").exists(), 10, lambda: f"{name} does not come up")
        [init] = psutil.Process(self._unshare.pid).children()
        self.init = init.pid
        self._space = _pid_namespace(self.init)

    def inside(self, *command: str) -> list[str]:
        """The command line that runs ``command`` on this host."""
        return ["nsenter", "--target", str(self.init), "--net", "--uts", "--mount", "--pid", "--", *command]

    def run(self, *command: str, seconds: float = 60) -> str:
        """What a command on this host writes to stdout; raises when it fails."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{self.name}: {command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Everything that lives on this host, without its init."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if process.pid != self.init and _pid_namespace(process.pid) == self._space and lives(process):
                    found.append(process)
        return found

    def trainers(self) -> list[psutil.Process]:
        """Launchers, ranks and data workers, and what started them here: ssh, pdsh, srun."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if any(part in " ".join(process.cmdline()) for part in _OF_A_RUN):
                    found.append(process)
        return found

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in self.trainers():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                is_python = "python" in Path(command[0]).name and "-m" not in command
                if is_python and process.environ().get("RANK") == str(number):
                    return process
        raise AssertionError(f"rank {number} does not run on {self.name}")

    def link(self, state: str) -> None:
        """``up`` or ``down``."""
        self.run("ip", "link", "set", "eth0", state)

    def sent_bytes(self) -> int:
        [link] = json.loads(self.run("ip", "-json", "-statistics", "link", "show", "eth0"))
        return int(link["stats64"]["tx"]["bytes"])

    def close(self) -> None:
        for pid in (self.init, self._unshare.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._unshare.wait()


class Pair:
    """node1 (10.77.0.1) and node2 (10.77.0.2), joined by a link, each reaching both by ssh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        public = (folder / "key.pub").read_text()
        (folder / "known_hosts").write_text("".join(f"{name} {public}" for name in NAMES))
        (folder / "ssh_config").write_text(_SSH.format(folder))
        (folder / "sshd_config").write_text(_SSHD.format(folder))
        lines = [f"10.77.0.{number} {name}" for number, name in enumerate(NAMES, 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self.hosts: list[Host] = []
        try:
            self.hosts += [Host(name, folder) for name in NAMES]
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        first, second = self.hosts
        cable = f"ip link add eth0 netns {first.init} type veth peer name eth0 netns {second.init}"
        subprocess.run(cable.split(), check=True)
        for number, host in enumerate(self.hosts, 1):
            host.run("ip", "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            host.link("up")
            log = self.folder / f"{host.name}.sshd.log"
            host.run("/usr/sbin/sshd", "-f", str(self.folder / "sshd_config"), "-E", str(log))

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def trainers(self) -> list[psutil.Process]:
        return [process for host in self.hosts for process in host.trainers()]

    def wait_for_nobody(self, seconds: float, but: str | None = None) -> None:
        """Until no launcher, rank or data worker lives on either host, but processes of this name."""

        def left() -> list[list[str]]:
            commands = [command_of(process) for process in self.trainers()]
            return [command for command in commands if command and command[0] != but]

        wait_until(lambda: not left(), seconds, lambda: f"left: {left()}")

    def clear(self) -> None:
        """After a test: the link is up, and no process of a job runs."""
        for host in self.hosts:
            host.link("up")
        for process in self.trainers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        for host in self.hosts:
            host.close()


def _pid_namespace(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/pid").readlink()
