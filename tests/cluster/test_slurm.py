"""launch/slurm/pretrain.sbatch, as shipped, on a Slurm of two nodes: what only options of sbatch change is what nodes
without GPUs need."""

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Pair, skip, why_not
from tests.cluster.runs import SAVE_EVERY, STEPS, losses, same_end, starts
from tests.cluster.slurm import NEEDED, Slurm
from tests.tools.grids import rest
from tests.tools.helpers import ROOT, wait_until
from tests.tools.jobs import PACED, ends, last_step

pytestmark = pytest.mark.cluster
SCRIPT = "launch/slurm/pretrain.sbatch"
CPU_NODES = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster(two_hosts: Pair, tmp_path_factory: pytest.TempPathFactory) -> Slurm:
    if reason := why_not(*NEEDED):
        skip(f"Slurm: {reason}")
    checkout = tmp_path_factory.mktemp("checkout")  # so that logs do not go to the real one
    (checkout / "launch").symlink_to(ROOT / "launch")
    (checkout / ".venv").symlink_to(sys.prefix)
    return Slurm(two_hosts, tmp_path_factory.mktemp("slurm"), checkout)


@pytest.fixture
def slurm(cluster: Slurm, pair: Pair) -> Iterator[Slurm]:
    yield cluster
    cluster.cancel_all()


def wait_for_step(slurm: Slurm, job: str, run_dir: Path, step: int) -> None:
    def reached() -> bool:
        assert slurm.field(job, "JobState") in ("PENDING", "CONFIGURING", "RUNNING"), slurm.logs(job)
        return last_step(run_dir) >= step

    wait_until(reached, 90, lambda: f"no step {step}\n{slurm.logs(job)}")


def test_a_job_finishes_with_a_log_per_rank(slurm, make, reference):
    config = make(2)
    job = slurm.submit("--nodes=2", *CPU_NODES, SCRIPT, str(config))
    slurm.wait_for_the_end(job)
    assert same_end(reference(2) / "run", config.parent / "run")
    logs = slurm.checkout / "runs" / "slurm" / job
    assert sorted(path.name for path in logs.iterdir()) == ["progress", "rank-0.log", "rank-1.log", "srun.log"]
    assert f"done: {STEPS} steps" in (logs / "rank-0.log").read_text()
    assert f"job {job} (start 1): 2 nodes (node[1-2])" in (slurm.checkout / f"slurm-relora_mora-{job}.log").read_text()


def test_a_preempted_job_continues_and_ends_bit_equal(slurm, pair, make, reference):
    """By the signal that --signal=USR1@300 sends to the tasks, by Slurm's own requeue, and by the loss of a rank."""
    config = make(2)
    run_dir = config.parent / "run"
    job = slurm.submit("--nodes=2", *CPU_NODES, SCRIPT, str(config))
    wait_for_step(slurm, job, run_dir, 10)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.start_again(job, 1)
    assert ends(run_dir)[-1]["code"] == 75
    assert "SIGUSR1" in ends(run_dir)[-1]["reason"]
    saved = [ends(run_dir)[-1]["step"]]
    assert 10 <= saved[0] < 30
    wait_for_step(slurm, job, run_dir, 30)
    slurm.run("scontrol", "requeue", job)
    slurm.start_again(job, 2)
    assert ends(run_dir)[-1]["code"] == 75
    assert "SIGTERM" in ends(run_dir)[-1]["reason"]
    saved.append(ends(run_dir)[-1]["step"])
    wait_for_step(slurm, job, run_dir, 50)
    pair.hosts[1].rank(1).send_signal(signal.SIGKILL)
    slurm.start_again(job, 3)
    assert ends(run_dir)[-1]["code"] == 69
    assert "rank 1 is gone" in ends(run_dir)[-1]["reason"]
    slurm.wait_for_the_end(job)
    assert same_end(reference(2) / "run", run_dir)
    log = (slurm.checkout / f"slurm-relora_mora-{job}.log").read_text()
    assert re.findall(r"\(start (\d)\)", log) == ["1", "2", "3", "4"]
    began = starts(run_dir)  # a start from an older checkpoint would give the same result
    assert began[:3] == [0, *saved]
    assert 40 <= began[3] < STEPS
    assert began[3] % SAVE_EVERY == 0


@pytest.mark.parametrize(
    "end,state", [("exit 2", "FAILED"), ("exit 69", "PENDING"), *rest(("kill -BUS $$", "PENDING"), mark="long")]
)
def test_the_exit_code_of_a_failed_rank_is_not_hidden_by_the_kill_of_another(slurm, make, tmp_path, end, state):
    """srun's own code is 137 each time, and its words about each task are what the job decides by."""
    config = make(2)
    trainer = tmp_path / "python"
    trainer.write_text(f"""#!/bin/bash
if [[ $1 == -P ]]; then exec .venv/bin/python "$@"; fi
if [[ $RANK == 0 ]]; then {end}; fi
kill -KILL $$
""")
    trainer.chmod(0o755)
    job = slurm.submit("--nodes=2", *CPU_NODES, SCRIPT, str(config), PYTHON=str(trainer))
    wait_until(
        lambda: slurm.field(job, "Restarts") == "1" or slurm.field(job, "JobState") == "FAILED",
        60,
        lambda: slurm.logs(job),
    )
    wait_until(lambda: slurm.field(job, "JobState") == state, 60, lambda: slurm.logs(job))
    log = (slurm.checkout / f"slurm-relora_mora-{job}.log").read_text()
    assert "task 1: Killed" in log
    assert (
        slurm.field(job, "ExitCode") == "2:0"
        if state == "FAILED"
        else "code 137, step 0 is saved: the job is requeued" in log
    )


def test_a_job_near_its_time_limit_saves_and_is_requeued(slurm, make):
    """By Slurm's own signal, which the shipped line asks for: five minutes before the limit, here two after the start,
    or up to one more early.

    Where it does not come the job is killed after seven minutes; this test waits for four.
    """
    config = make(2, steps=100_000)
    run_dir = config.parent / "run"
    job = slurm.submit("--nodes=2", "--time=7", *CPU_NODES, SCRIPT, str(config), PROGRAM=str(PACED))
    slurm.start_again(job, 1, seconds=240)
    [end] = ends(run_dir)
    assert end["code"] == 75
    assert "SIGUSR1" in end["reason"]
    assert end["step"] > 0
    wait_for_step(slurm, job, run_dir, end["step"] + 5)
    assert len(losses(run_dir)) >= end["step"] + 5, "every step once"
    assert starts(run_dir) == [0, end["step"]]


def test_an_array_trains_a_seed_per_task_and_requeues_each_by_itself(slurm, make):
    config = make(2)
    runs = config.parent / "runs"
    array = ["--array=1-2", "--nodes=1", *CPU_NODES]
    seeds = ["--train.seed=$SLURM_ARRAY_TASK_ID", f"--train.run_dir={runs}/seed-$SLURM_ARRAY_TASK_ID"]
    job = slurm.submit(*array, SCRIPT, str(config), *seeds)
    for task in ("1", "2"):
        wait_for_step(slurm, f"{job}_{task}", runs / f"seed-{task}", 5)
    [first] = [
        task for task in ("1", "2") if slurm.field(f"{job}_{task}", "JobId") == job
    ]  # its number stands for the array, too
    other = {"1": "2", "2": "1"}[first]
    slurm.run("scancel", "--signal=USR1", f"{job}_{first}")
    slurm.start_again(f"{job}_{first}", 1)
    for task in ("1", "2"):
        slurm.wait_for_the_end(f"{job}_{task}")
    assert slurm.field(f"{job}_{other}", "Restarts") == "0"
    assert losses(runs / "seed-1") != losses(runs / "seed-2")


@pytest.mark.parametrize("batch_node", ["node1", *rest(("node2",), mark="long")])
def test_a_job_that_lost_a_node_continues_when_the_node_is_back(slurm, pair, make, reference, batch_node):
    """node2, which has a rank only, or the batch script and srun as well: then Slurm has to requeue the job, and to end
    what is left there."""
    config = make(2, peer_timeout_seconds=10.0)
    run_dir = config.parent / "run"
    job = slurm.submit(
        "--nodes=2", "--constraint=node1|node2", f"--batch={batch_node}", *CPU_NODES, SCRIPT, str(config)
    )
    wait_for_step(slurm, job, run_dir, 35)
    assert slurm.field(job, "BatchHost") == batch_node
    pair.hosts[1].link("down")
    wait_until(lambda: "down" in slurm.states(), 60, slurm.states)
    pair.wait_for_nobody(60, but="srun")  # which cannot hear how the rank on the other side ended
    assert {end["code"] for end in ends(run_dir)} == {69}
    assert last_step(run_dir) < STEPS
    pair.hosts[1].link("up")
    wait_until(lambda: slurm.states() == ["idle", "idle"], 120, slurm.states)
    slurm.start_again(job, 1)
    slurm.wait_for_the_end(job)
    assert same_end(reference(2) / "run", run_dir)
