"""Worker processes: what ends them, what does not, and the errors that the trainer gets."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from relora_mora.data.errors import SourceError, WorkerError
from relora_mora.data.shard import Shard
from relora_mora.data.stream.stream import TrainStream
from tests.tools.data_tools import data_config, write_shard, write_shards
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
    return TrainStream(config, tokenizer_path=tokenizer_path, batch_size=8, lanes=8, rank=0, world_size=1)


@pytest.mark.more
def test_signals_do_not_stop_a_worker_and_close_ends_it_immediately(source, tokenizer_path):
    with _stream(source, tokenizer_path, workers=1) as stream:
        (worker,) = stream._producers
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
        pids = [worker.pid for worker in stream._producers]
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
        os.kill(stream._producers[1].pid, signal.SIGKILL)
        stream._producers[1]._process.wait(5)
        began = time.monotonic()
        assert stream.ready(5.0)
        with pytest.raises(WorkerError, match="was killed by signal 9"):
            next(stream)
        assert time.monotonic() - began < 2


TRAINER = """
import os, signal, sys
from relora_mora.data.stream.stream import TrainStream
from tests.tools.data_tools import data_config
config = data_config(sys.argv[1], workers=2)
stream = TrainStream(config, tokenizer_path=sys.argv[2], batch_size=16, lanes=8, rank=0, world_size=1)
pids = [worker.pid for worker in stream._producers]
print(*pids, flush=True)
next(stream)
os.kill(pids[0], signal.SIGKILL)
for batch in stream:
    pass
"""


@contextmanager
def _trainer(source, tokenizer_path):
    """A trainer whose worker is killed after a batch, and the pids of its workers."""
    arguments = [sys.executable, "-c", TRAINER, str(source), tokenizer_path]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trainer:
        try:
            yield trainer, [int(pid) for pid in trainer.stdout.readline().split()]
        finally:
            trainer.kill()


def _lives(pid):
    try:
        return lives(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def _gone(pids, within_seconds=5.0):
    end = time.monotonic() + within_seconds
    while any(map(_lives, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return len(pids) == 2 and not any(map(_lives, pids))


@pytest.mark.more
def test_a_trainer_that_fails_without_closing_leaves_no_worker(source, tokenizer_path):
    with _trainer(source, tokenizer_path) as (trainer, pids):
        _, errors = trainer.communicate(timeout=60)
        assert trainer.returncode == 1
        assert f"data worker {pids[0]} was killed by signal 9" in errors.splitlines()[-1]
        assert _gone(pids)


@pytest.mark.more
def test_workers_die_with_a_killed_trainer_also_while_they_wait_for_the_network(tmp_path, tokenizer_path, monkeypatch):
    with (
        serving(tmp_path, lambda n: "503") as server,
        _trainer(f"{server.url}/a.json", tokenizer_path) as (trainer, pids),
    ):
        end = time.monotonic() + 60
        while len(server.requests) < 4 and time.monotonic() < end:
            time.sleep(0.02)
        assert len(server.requests) >= 4
        assert all(map(_lives, pids))
        trainer.kill()
        assert _gone(pids)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_is_gone_is_an_error_of_the_system(tokenizer_path, workers):
    """Reading this file at its beginning gives EIO, like a network file system that has lost its server."""
    config = data_config("unused.json", workers=workers)
    shards = [Shard("part-1.json", "/proc/self/mem")]
    with TrainStream(
        config, tokenizer_path=tokenizer_path, batch_size=1, lanes=1, rank=0, world_size=1, shards=shards
    ) as stream:
        with pytest.raises(OSError, match="/proc/self/mem") as caught:
            next(stream)
        assert caught.value.errno == errno.EIO


@pytest.mark.more
def test_an_error_is_the_same_with_and_without_workers_and_stays(tmp_path, tokenizer_path):
    path = write_shard(tmp_path / "a.json", [f"text {n}" for n in range(50)] + [b"rubbish"] * 50)
    config = data_config(path, max_bad_fraction=0.01, sequence_length=8)
    seen = []
    for workers in (0, 1):
        made = 0
        with TrainStream(
            config.model_copy(update={"workers": workers}),
            tokenizer_path=tokenizer_path,
            batch_size=1,
            lanes=1,
            rank=0,
            world_size=1,
        ) as stream:
            with pytest.raises(SourceError) as error:
                while made < 1000:
                    next(stream)
                    made += 1
            assert stream.ready(0.0)
            with pytest.raises(SourceError):
                next(stream)
        seen.append((made, str(error.value)))
    assert seen[0] == seen[1]
    assert 20 < seen[0][0] < 1000
