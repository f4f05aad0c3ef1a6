"""Two ranks without a launcher, and one is lost at a bad moment: how and how soon the other one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools.helpers import ROOT
from tests.tools.jobs import ends, write_config
from tests.tools.ports import free_port
from tests.tools.runs import checkpoint_at, run_config, write_inputs

pytestmark = [pytest.mark.distributed, pytest.mark.stops]


# one rank connects and the other accepts, depending on the order of their addresses; a child keeps the sockets open, as
# if the host had lost its power, since otherwise the other rank might notice the end immediately
KILLED_AS_IT_CONNECTS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void end(void) {
    if (access(getenv("CONNECTING"), F_OK) != 0)
        return;
    if (fork() == 0) {
        sleep(30);
        _exit(0);
    }
    raise(SIGKILL);
}

int accept(int socket, struct sockaddr *address, socklen_t *length) {
    end();
    return ((int (*)(int, struct sockaddr *, socklen_t *))dlsym(RTLD_NEXT, "accept"))(socket, address, length);
}

int connect(int socket, const struct sockaddr *address, socklen_t length) {
    end();
    return ((int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "connect"))(socket, address, length);
}
"""


def both_ranks(config: Path, what: str, **environment: str) -> tuple[list[int], float, str]:
    """Their exit codes, the seconds from the end of rank 1 to the end of rank 0, and the output of both.

    Only rank 1 gets ``environment``.
    """
    with config.with_suffix(".log").open("wb") as out:
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "VICTIM": what}
        job |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "tests" / "tools" / "victim.py"), str(config)]
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        own[1] |= environment
        ranks = [subprocess.Popen(command, env={**os.environ, **job, **each}, stdout=out, stderr=out) for each in own]
    try:
        second = ranks[1].wait(240)  # includes the whole start on a busy machine
        begin = time.monotonic()
        first = ranks[0].wait(240)
        return [first, second], time.monotonic() - begin, config.with_suffix(".log").read_text()
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture
def config(tokenizer_path: str, tmp_path: Path) -> Path:
    settings = run_config(
        write_inputs(tmp_path),
        tokenizer_path,
        tmp_path / "run",
        2,
        train={"peer_timeout_seconds": 50.0},
        checkpoint={"every_steps": 4},
    )
    return write_config(settings, tmp_path / "run.yaml")


def test_the_wait_for_a_rank_lost_while_connecting_is_limited(config, tmp_path):
    """gloo's own connecting has no timeout."""
    library = tmp_path / "connect.so"
    compiler = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(compiler, input=KILLED_AS_IT_CONNECTS, text=True, check=True)
    codes, _, output = both_ranks(
        config, "while it connects", LD_PRELOAD=str(library), CONNECTING=str(tmp_path / "connecting")
    )
    assert codes == [69, -signal.SIGKILL]
    assert "the ranks did not join within 10 s; " in output


@pytest.mark.parametrize(
    "moment,code,step,reason",
    [
        ("at the end", 0, 10, ""),
        ("in a save", 69, None, "rank 1 is gone"),
        ("text", 69, 3, "a disk or network failed (Stale file handle: part-1.json.gz)"),  # the state is saved
        ("device", 69, None, "the device of rank 1 failed (AcceleratorError: CUDA error: unspecified"),
        ("disk", 69, None, "a disk or network failed rank 1 (Stale file handle: metrics.jsonl)"),
    ],
)
def test_a_loss_ends_both_ranks_soon_with_its_reason(config, moment, code, step, reason):
    codes, seconds, output = both_ranks(config, moment)
    assert codes == [code, -signal.SIGKILL if moment in ("at the end", "in a save") else code], output
    assert seconds < 35, output
    run_dir = config.parent / "run"
    [end] = ends(run_dir)
    assert end["code"] == code and reason in end["reason"], end
    if step is not None:
        assert end["step"] == step
        assert checkpoint_at(run_dir, step).exists()
