"""Signals, lost ranks and launchers: how and how fast a job of two processes ends, and that it continues later."""

import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from relora_mora.checkpoint.layout import list_checkpoints
from relora_mora.checkpoint.reader import first_whole
from tests.tools.grids import rest
from tests.tools.jobs import Job, checkpoints, ends, last_step, write_config
from tests.tools.runs import run_config

pytestmark = [pytest.mark.distributed, pytest.mark.stops]
STEPS = 100_000


@pytest.fixture
def config(inputs, tokenizer_path, tmp_path) -> Path:
    """An endless run with a data worker per rank."""
    settings = run_config(
        inputs,
        tokenizer_path,
        tmp_path / "run",
        2,
        train={"steps": STEPS, "peer_timeout_seconds": 10.0},
        checkpoint={"every_steps": 20, "keep_last": 2},
        data={"workers": 1},
        eval={"every_steps": 0},
    )
    return write_config(settings, tmp_path / "run.yaml")


def _saved_step(run_dir: Path) -> int:
    chosen, passed_over = first_whole(list_checkpoints(run_dir / "checkpoints"))
    assert chosen is not None
    assert not passed_over
    return int(chosen.name[5:])


@pytest.mark.parametrize(
    "number,target,launcher",
    [
        (signal.SIGTERM, "rank 1", "deepspeed"),
        (signal.SIGINT, "rank 0", "torchrun"),
        (signal.SIGTERM, "launcher", "deepspeed"),
        *rest(
            (signal.SIGUSR1, "rank 1", "torchrun"),
            (signal.SIGTERM, "launch.py", "deepspeed"),
            (signal.SIGINT, "launch.py", "deepspeed"),
            (signal.SIGTERM, "launcher", "torchrun"),
            mark="long",
        ),
    ],
)
def test_a_signal_saves_and_ends_all_ranks(config, number, target, launcher):
    run_dir = config.parent / "run"
    job = Job(config, launcher=launcher)
    job.wait_for_step(run_dir, 25)
    hit = {
        "rank 0": lambda: job.rank(0),
        "rank 1": lambda: job.rank(1),
        "launch.py": job.launch_py,
        "launcher": lambda: job.process,
    }[target]()
    begin = time.monotonic()
    hit.send_signal(number)
    code = job.wait(20)
    job.wait_for_nobody(20 - (time.monotonic() - begin))
    if target.startswith("rank"):
        assert code == (75 if launcher == "deepspeed" else 1)  # torchrun has its own exit code
    else:
        assert code not in (0, None)
    (end,) = ends(run_dir)
    assert end["code"] == 75
    assert end["step"] == _saved_step(run_dir) >= 25
    assert {"rank 0": number.name, "rank 1": f"{number.name} to rank 1", "launch.py": "rank", "launcher": "rank"}[
        target
    ] in end["reason"]
    assert f"stopping after step {end['step']}" in job.output
    assert all(
        name == "latest" or (name.startswith("step-") and not name.endswith(".tmp")) for name in checkpoints(run_dir)
    )


def test_a_signal_during_the_start_ends_it(config):
    job = Job(config)
    job.wait_until(lambda: catches(job.find_rank(1), signal.SIGTERM))
    job.rank(1).send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    job.wait_for_nobody(10)


def catches(process: psutil.Process | None, number: signal.Signals) -> bool:
    """Whether a process runs and handles a signal, according to the kernel."""
    if process is None:
        return False
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("how,lost", [("killed", 1), ("hangs", 0), *rest(("killed", 0), ("hangs", 1), mark="long")])
def test_a_lost_rank_ends_the_job_and_is_named(config, lost, how):
    run_dir = config.parent / "run"
    job = Job(config)
    job.wait_for_step(run_dir, 25)
    begin = time.monotonic()
    job.rank(lost).send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    job.wait_until(lambda: (run_dir / "ends.jsonl").exists(), seconds=30)
    if how == "hangs":  # a stopped process: launch.py kills it 30 s after the others have ended
        assert job.wait(60) != 0
    else:
        assert job.wait(30 - (time.monotonic() - begin)) != 0
    job.wait_for_nobody(5)
    (end,) = ends(run_dir)
    assert end["code"] == 69
    assert f"rank {lost} is gone" in end["reason"]
    assert "last action: step" in end["reason"]
    assert end["rank"] == 1 - lost
    assert f"rank {lost} is gone" in job.output
    before = _saved_step(run_dir)
    again = Job(config, "--train.steps=100000")
    again.wait_for_step(run_dir, before + 20)
    again.rank(0).send_signal(signal.SIGTERM)
    assert again.wait(20) == 75


@pytest.mark.parametrize("target", ["launch.py", *rest(("launcher",), mark="long")])
def test_ranks_end_with_their_launcher_and_the_same_command_waits_for_them(config, target):
    run_dir = config.parent / "run"
    job = Job(config)
    job.wait_for_step(run_dir, 25)
    assert {job.rank(0).pid, job.rank(1).pid} <= {process.pid for process in job.processes()}
    (job.launch_py() if target == "launch.py" else job.process).send_signal(signal.SIGKILL)
    begin = time.monotonic()
    again = Job(config, port=job.port)
    job.wait_for_nobody(10)
    assert time.monotonic() - begin < 10
    before = _saved_step(run_dir)
    again.wait_for_step(run_dir, before + 5)
    again.rank(1).send_signal(signal.SIGUSR1)
    assert again.wait(20) == 75
    assert len((run_dir / "starts.jsonl").read_text().splitlines()) == 2


def test_two_trainers_never_share_a_run_folder(config):
    run_dir = config.parent / "run"
    first = Job(config)
    first.wait_for_step(run_dir, 5)
    second = Job(config)  # on another port
    assert second.wait(180) == 2
    assert "another trainer works on this run" in second.output
    assert "Traceback" not in second.output
    assert first.process.poll() is None
    assert last_step(run_dir) > 5
    first.rank(0).send_signal(signal.SIGTERM)
    assert first.wait(20) == 75
