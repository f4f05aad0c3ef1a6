"""Signals, launchers, and records of ends, in small processes without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from relora_mora.supervise.exits import record_end
from relora_mora.supervise.guard import Guard
from relora_mora.supervise.heartbeat import PeerFailure
from relora_mora.supervise.launchers import is_launcher
from tests.tools.each import each

BUSY = """
import hashlib, sys
from relora_mora.supervise.guard import Guard
guard = Guard()
if sys.argv[1] != "start":
    guard.training()
if sys.argv[1] == "decided":
    from pathlib import Path
    guard.record_in(Path(sys.argv[2]))
    guard.decide(75, "saved")
print("up", flush=True)
hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)  # one long call, like a collective: no Python handler runs
"""


@pytest.fixture
def busy():
    started = []

    def start(phase: str, *more: str, on_hangup: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[str]:
        before = signal.signal(signal.SIGHUP, on_hangup)  # a child inherits it, and pytest may run under nohup
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", BUSY, phase, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        finally:
            signal.signal(signal.SIGHUP, before)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def _ends_within(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


@each("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_the_process(busy, number):
    process = busy("start")
    process.send_signal(number)
    code, errors = _ends_within(process, 60)
    assert code == 75
    assert f"{number.name} to rank 0" in errors


def test_a_launcher_that_ends_after_a_request_to_stop_sets_no_deadline():
    """Ctrl-C ends ``deepspeed`` immediately, and ranks that save take as long as they need."""
    gone = SimpleNamespace(gone=lambda: "deepspeed")
    with Guard(signals=False) as guard:
        guard.training()
        guard.stop_reason = "SIGINT to rank 0"
        guard._check_launchers(gone)
        assert guard.stop_reason == "SIGINT to rank 0"
        assert guard._launcher_deadline is None
        guard.stop_reason = None
        guard._check_launchers(gone)
        assert "is gone" in (guard.stop_reason or "")
        assert guard._launcher_deadline is not None


def test_while_training_the_first_signal_waits_and_a_second_exits_immediately(busy):
    process = busy("training")
    process.send_signal(signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    # they arrive together, as if a launcher passed one on, so they are one request
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.3)
    _signal_until_it_ends(process)
    code, errors = _ends_within(process, 60)
    assert code == 143
    assert "exited without saving" in errors


def test_a_signal_after_the_end_is_decided_does_not_change_it(busy, tmp_path):
    """Closing W&B may take long."""
    process = busy("decided", str(tmp_path))
    _signal_until_it_ends(process)
    assert _ends_within(process, 60) == (75, "")
    [line] = (tmp_path / "ends.jsonl").read_text().splitlines()
    assert (json.loads(line)["code"], json.loads(line)["reason"]) == (75, "saved")


@each(
    "happens",
    [
        lambda guard: guard._check_launchers(SimpleNamespace(gone=lambda: "torchrun")),
        lambda guard: guard.end(PeerFailure([1], 69, "rank 1 is gone", announced=True)),
        lambda guard: guard.folder_lost("marker-missing"),
    ],
)
def test_a_loss_after_the_end_is_decided_does_not_change_it(monkeypatch, happens):
    def leave_now(code, *words, linger=0.0):
        raise SystemExit(code)

    monkeypatch.setattr("relora_mora.supervise.exits.leave_now", leave_now)
    with Guard(signals=False) as guard:
        guard.training()
        guard._launcher_deadline = 0.0
        guard.decide(0, "done")
        with pytest.raises(SystemExit) as end:
            happens(guard)
    assert end.value.code == 0


def _signal_until_it_ends(process: subprocess.Popen[str]) -> None:
    """A signal that comes soon after the first one is the same request, so this sends several."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)


SILENCED = """
import os, sys
from pathlib import Path
from relora_mora.supervise.guard import Guard
from relora_mora.supervise.lock import RunLock
guard = Guard()
folder = Path(sys.argv[1])
lock = RunLock(folder)
lock.acquire()
guard.hold(lock)
os.mkfifo(folder / "ends.jsonl")  # opening it takes forever, like a disk that is gone
if sys.argv[2] == "training":
    guard.training()
print("up", flush=True)
while True:
    sys.stderr.write("x" * 2**16)  # a pipe holds little, and nobody reads it
"""


ALL_RANKS = """
import os, sys
from pathlib import Path
from relora_mora.supervise.guard import Guard
from relora_mora.supervise.heartbeat import PeerFailure
for rank in range(3):
    if os.fork() == 0:
        guard = Guard(signals=False)
        guard.rank = rank
        guard.record_in(Path(sys.argv[1]))
        guard.end(PeerFailure([int(sys.argv[2])], 69, "gone"))
    os.wait()
"""


@each("lost,speakers,recorder", [(2, [0], 0), (0, [0, 1, 2], 1)])
def test_an_end_is_reported_even_if_the_first_rank_is_lost(tmp_path, lost, speakers, recorder):
    command = [sys.executable, "-c", ALL_RANKS, str(tmp_path), str(lost)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    prefixes = [f"[rank {rank}] " if rank else "" for rank in speakers]
    assert done.stderr.splitlines() == [f"{prefix}the run ended: gone" for prefix in prefixes]
    [line] = (tmp_path / "ends.jsonl").read_text().splitlines()
    assert (json.loads(line)["rank"], json.loads(line)["code"]) == (recorder, 69)


@pytest.mark.more
@each("phase,signals,code", [("start", 1, 75), ("training", 2, 143)])
def test_a_full_pipe_and_a_disk_that_does_not_answer_do_not_prevent_an_end(phase, signals, code, tmp_path):
    command = [sys.executable, "-c", SILENCED, str(tmp_path), phase]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "up\n"
            process.send_signal(signal.SIGTERM)
            if signals == 2:
                _signal_until_it_ends(process)
            assert process.wait(60) == code
        finally:
            process.kill()


CLOSED = """
import os, signal
from relora_mora.supervise.guard import Guard
Guard().close()
os.kill(os.getpid(), signal.SIGTERM)
print("end")
"""


def test_after_the_end_is_decided_signals_change_nothing():
    done = subprocess.run([sys.executable, "-c", CLOSED], capture_output=True, text=True, check=False)
    assert done.stdout == "end\n"


@each(
    "command,launches",
    [
        (["/venv/bin/python", "/venv/bin/deepspeed", "--num_gpus=2", "launch/pretrain.py"], True),
        (["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "launch/pretrain.py"], True),
        (["/venv/bin/python3.11", "/venv/bin/torchrun", "--nproc_per_node=2", "launch/pretrain.py"], True),
        (["python", "-m", "torch.distributed.run", "launch/pretrain.py"], True),
        (["python", "/x/site-packages/torch/distributed/run.py", "launch/pretrain.py"], True),
        (["bash", "-c", "deepspeed launch/pretrain.py"], False),
        (["python", "-m", "pytest", "deepspeed"], False),
        (["python", "my_queue.py", "deepspeed"], False),
        (["-bash"], False),
        ([], False),
    ],
)
def test_launchers_are_known_by_their_command_line(command, launches):
    assert is_launcher(command) is launches


def test_a_launcher_that_ends_is_noticed(tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE)\n"
        "time.sleep(600)"
    )
    look = (
        "import time\nfrom relora_mora.supervise.launchers import Launchers\nfound = Launchers()\n"
        "print(found.gone(), flush=True)\n"
        "while not found.gone():\n    time.sleep(0.02)\n"
        "print(found.gone(), flush=True)"
    )
    with subprocess.Popen([sys.executable, launcher, look], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "None\n"
        process.kill()
        assert process.stdout.readline() == f"pid {process.pid}\n"


def test_ends_are_appended_and_a_folder_that_cannot_be_written_is_not_an_error(tmp_path):
    record_end(tmp_path, code=75, reason="SIGTERM to rank 1", rank=0, step=7)
    record_end(tmp_path, code=0, reason="done", rank=0, step=9)
    lines = [json.loads(line) for line in (tmp_path / "ends.jsonl").read_text().splitlines()]
    assert [(line["code"], line["reason"], line["step"]) for line in lines] == [
        (75, "SIGTERM to rank 1", 7),
        (0, "done", 9),
    ]
    record_end(tmp_path / "nowhere", code=1, reason="x", rank=0, step=None)
    assert not (tmp_path / "nowhere").exists()
