"""Worker processes: what ends them, what does not, and the errors that the trainer gets."""

import errno
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from relora_mora.data.errors import WorkerError
from relora_mora.data.shard import Shard
from tests.data.stream_tools import stream_of
from tests.tools.data_tools import data_config, write_shards
from tests.tools.each import each
from tests.tools.faulty_server import serving
from tests.tools.jobs import lives

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 5, 40)
    return folder / "*.gz"


def _stream(source, tokenizer_path, **changes):
    config = data_config(source, **{"prefetch_batches": 1, **changes})
    return stream_of(config, tokenizer_path, lanes=8)


@pytest.mark.more
def test_signals_do_not_stop_a_worker_and_close_ends_it_immediately(source, tokenizer_path):
    with _stream(source, tokenizer_path, workers=1) as stream:
        (worker,) = stream._workers
        for number in STOPS:
            os.kill(worker.pid, number)  # while it starts
        for _ in range(4):
            next(stream)
        for number in STOPS:
            os.kill(worker.pid, number)
        for _ in range(20):
            next(stream)
        began = time.monotonic()
        pid = worker.pid
    assert time.monotonic() - began < 2
    assert not psutil.pid_exists(pid)


@pytest.mark.more
def test_a_killed_worker_is_one_clear_error_that_stays_and_close_leaves_no_process(source, tokenizer_path):
    with _stream(source, tokenizer_path, workers=2) as stream:
        next(stream)
        pids = [worker.pid for worker in stream._workers]
        os.kill(pids[1], signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(
                WorkerError,
                match=rf"^data worker {pids[1]} was killed by signal 9; if memory ran out, lower data\.workers",
            ):
                for _ in range(100):
                    next(stream)
        assert stream.ready(0.0)
        assert psutil.pid_exists(pids[0])
    assert not any(psutil.pid_exists(pid) for pid in pids)  # a zombie still has its pid


def test_a_killed_worker_is_reported_while_another_waits_for_the_network(tmp_path, tokenizer_path, monkeypatch):
    with (
        serving(tmp_path, lambda n: "503") as server,
        _stream(f"{server.url}/a.json", tokenizer_path, workers=2) as stream,
    ):
        assert not stream.ready(0.1)
        os.kill(stream._workers[1].pid, signal.SIGKILL)
        stream._workers[1]._process.wait(5)
        began = time.monotonic()
        assert stream.ready(5.0)
        with pytest.raises(WorkerError, match="was killed by signal 9"):
            next(stream)
        assert time.monotonic() - began < 2


TRAINER = """
import sys
from tests.data.stream_tools import stream_of
from tests.tools.data_tools import data_config
stream = stream_of(data_config(sys.argv[1], workers=2), sys.argv[2], batch_size=16, lanes=8)
print(*[worker.pid for worker in stream._workers], flush=True)
next(stream)
"""


def _lives(pid):
    return psutil.pid_exists(pid) and lives(psutil.Process(pid))


@pytest.mark.more
def test_workers_die_with_a_killed_trainer_also_while_they_wait_for_the_network(tmp_path, tokenizer_path):
    with serving(tmp_path, lambda n: "503") as server:
        command = [sys.executable, "-c", TRAINER, f"{server.url}/a.json", tokenizer_path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
            try:
                pids = [int(pid) for pid in trainer.stdout.readline().split()]
                _wait_until(lambda: len(server.requests) >= 4, 60)
                assert len(pids) == 2 and all(map(_lives, pids))
            finally:
                trainer.kill()
        _wait_until(lambda: not any(map(_lives, pids)), 5)


def _wait_until(holds, seconds):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@each("workers", [0, 1])
def test_a_disk_that_is_gone_is_an_error_of_the_system(tokenizer_path, workers):
    """Reading this file at its beginning gives EIO, like a network file system that has lost its server."""
    config = data_config("unused.json", workers=workers)
    shards = [Shard("part-1.json", "/proc/self/mem")]
    with stream_of(config, tokenizer_path, batch_size=1, lanes=1, shards=shards) as stream:
        with pytest.raises(OSError, match="/proc/self/mem") as caught:
            next(stream)
        assert caught.value.errno == errno.EIO
