"""Signals, launchers, and records of ends, in small processes without torch."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from relora_mora.supervise.exits import PeerFailure, record_end
from relora_mora.supervise.guard import Guard
from relora_mora.supervise.launchers import is_launcher
from tests.tools.each import each
from tests.tools.jobs import ends as ends_in

BUSY = """
import hashlib, sys
from relora_mora.supervise.guard import Guard
guard = Guard()
if sys.argv[1] != "start":
    guard.training()
if sys.argv[1] == "closed":
    guard.close()
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

    def start(phase: str, *more: str, code: str = BUSY) -> subprocess.Popen[str]:
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a child inherits it, and pytest may run under nohup
        command = [sys.executable, "-c", code, phase, *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGHUP, before)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def _end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@each("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_the_process(busy, number):
    process = busy("start")
    process.send_signal(number)
    code, errors = _end_of(process)
    assert code == 75
    assert f"{number.name} to rank 0" in errors


def test_a_launcher_that_ends_after_a_request_to_stop_sets_no_deadline():
    """Ctrl-C ends ``deepspeed`` immediately, and ranks that save take as long as they need."""
    gone = SimpleNamespace(gone=lambda: "deepspeed")
    with Guard(signals=False) as guard:
        guard.training()
        for reason, sets_one in (("SIGINT to rank 0", False), (None, True)):
            guard.stop_reason = reason
            guard._check_launchers(gone)
            assert (guard._launcher_deadline is not None) is sets_one
        assert "is gone" in guard.stop_reason


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
    code, errors = _end_of(process)
    assert code == 143
    assert "exited without saving" in errors


def test_a_signal_after_the_guard_is_closed_changes_nothing(busy):
    process = busy("closed")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)


def test_a_signal_after_the_end_is_decided_does_not_change_it(busy, tmp_path):
    """Closing W&B may take long."""
    process = busy("decided", str(tmp_path))
    _signal_until_it_ends(process)
    assert _end_of(process) == (75, "")
    [line] = ends_in(tmp_path)
    assert (line["code"], line["reason"]) == (75, "saved")


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
folder = Path(sys.argv[2])
lock = RunLock(folder)
lock.acquire()
guard.hold(lock)
guard.record_in(folder)
os.mkfifo(folder / "ends.jsonl")  # opening it takes forever, like a disk that is gone
if sys.argv[1] == "training":
    guard.training()
print("up", flush=True)
while True:
    sys.stderr.write("x" * 2**16)  # a pipe holds little, and nobody reads it
"""


ALL_RANKS = """
import os, sys
from pathlib import Path
from relora_mora.supervise.guard import Guard
from relora_mora.supervise.exits import PeerFailure
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
    [line] = ends_in(tmp_path)
    assert (line["rank"], line["code"]) == (recorder, 69)


@pytest.mark.more
@each("phase,signals,code", [("start", 1, 75), ("training", 2, 143)])
def test_a_full_pipe_and_a_disk_that_does_not_answer_do_not_prevent_an_end(busy, phase, signals, code, tmp_path):
    process = busy(phase, str(tmp_path), code=SILENCED)
    process.send_signal(signal.SIGTERM)
    if signals == 2:
        _signal_until_it_ends(process)
    assert process.wait(60) == code


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
    ends = [{"code": 75, "reason": "SIGTERM to rank 1", "step": 7, "rank": 0}]
    ends += [{"code": 0, "reason": "done", "step": 9, "rank": 0}]
    for end in ends:
        record_end(tmp_path, **end)
    assert [{**line, **end} for line, end in zip(ends_in(tmp_path), ends, strict=True)] == ends_in(tmp_path)
    record_end(tmp_path / "nowhere", code=1, reason="x", rank=0, step=None)
    assert not (tmp_path / "nowhere").exists()
