"""A Slurm cluster on the two hosts: slurmctld and munged on the first, slurmd and munged on both."""

import os
import time
from pathlib import Path

from tests.cluster.hosts import NAMES, Host, Pair
from tests.cluster.runs import ENVIRONMENT
from tests.tools.helpers import wait_until
from tests.tools.jobs import command_of

NEEDED = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged")
NODE_LOST_SECONDS = 10  # SlurmdTimeout: 300 by default
_CONF = """ClusterName=test
SlurmctldHost={names[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout={lost}
ReturnToService=2
KillWait=20
MinJobAge=3600
NodeName={names[0]} NodeAddr=10.77.0.1 CPUs=4 RealMemory=8000 Feature={names[0]}
NodeName={names[1]} NodeAddr=10.77.0.2 CPUs=4 RealMemory=8000 Feature={names[1]}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class Slurm:
    """Started on the two hosts; jobs are submitted on the first, from ``checkout``."""

    def __init__(self, pair: Pair, folder: Path, checkout: Path) -> None:
        self.pair = pair
        self.head: Host = pair.hosts[0]
        self.folder, self.checkout = folder, checkout
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), **ENVIRONMENT}
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(_CONF.format(names=NAMES, folder=folder, lost=NODE_LOST_SECONDS))
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for host in pair:
            host.run("mkdir", "-p", "/run/munge")
            # its own log folder would have to belong to root; --force: a temporary folder may be open to others
            files = [f"--key-file={key}", f"--log-file={folder / host.name}.munged.log", "--seed-file=/run/munge/seed"]
            host.run("munged", "--force", *files)
        self.run("slurmctld")
        for host in pair:
            host.run("env", *self._variables(), "slurmd", "-N", host.name)
        wait_until(lambda: self.states() == ["idle", "idle"], 30, lambda: f"nodes: {self.states()}")

    def _variables(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.environment.items()]

    def run(self, *command: str) -> str:
        """A command on the head node."""
        return self.head.run("env", f"--chdir={self.checkout}", *self._variables(), *command)

    def states(self) -> list[str]:
        found = self.run("sinfo", "--noheader", "--Node", "--format=%T").splitlines()
        return [line.strip().rstrip("*") for line in found]

    def submit(self, *arguments: str, **environment: str) -> str:
        """The id of a new job."""
        variables = [f"{key}={value}" for key, value in environment.items()]
        return self.run("env", *variables, "sbatch", "--parsable", *arguments).strip()

    def field(self, job: str, name: str) -> str:
        """JobState, Restarts, ExitCode, ... of a job."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)[name]

    def start_again(self, job: str, restarts: int, seconds: float = 60) -> None:
        """Waits until a job is back in the queue, then starts it immediately; Slurm would hold it for two minutes.

        A node that still runs a part of it would refuse it and be drained.
        """

        def waits() -> bool:
            state = self.field(job, "JobState")
            assert state not in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), f"{job} is {state}\n{self.logs(job)}"
            return (self.field(job, "Restarts"), state) == (str(restarts), "PENDING")

        wait_until(waits, seconds, lambda: self.logs(job))
        wait_until(lambda: not self._parts(job), seconds, lambda: f"left: {self._parts(job)}\n{self.logs(job)}")
        time.sleep(2)  # a node refuses a job that it has ended in the same second
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _parts(self, job: str) -> list[str]:
        """What runs of a job on the nodes: its batch script, and its steps."""
        daemon = f"slurmstepd: [{self.field(job, 'JobId')}."
        names = [" ".join(command_of(process)) for host in self.pair for process in host.processes()]
        return [name for name in names if name.startswith(daemon)]

    def wait_for_the_end(self, job: str, seconds: float = 90) -> None:
        """Until a job has ended well."""

        def completed() -> bool:
            state = self.field(job, "JobState")
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"), (
                f"{job} is {state}\n{self.logs(job)}"
            )
            return state == "COMPLETED"

        wait_until(completed, seconds, lambda: self.logs(job))

    def logs(self, job: str = "") -> str:
        """The last lines of the logs of the daemons and of a job."""
        paths = [*self.folder.glob("*.log"), *self.checkout.glob("*.log"), *self.checkout.glob("runs/slurm/*/*.log")]
        job = job.split("_")[0]
        wanted = [path for path in sorted(paths) if path.parent == self.folder or job in str(path)]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in wanted)

    def cancel_all(self) -> None:
        """Leaves no job in the queue."""
        self.run("scancel", "--full", "--me")
        wait_until(lambda: not self.run("squeue", "--noheader"), 60, lambda: self.run("squeue"))
