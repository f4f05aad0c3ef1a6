"""relora-mora board: runs are found and named, and its first page shows both losses."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs
from urllib.request import urlopen

import pytest

from relora_mora.config.load import dump, validate
from relora_mora.train.log.loggers import TensorBoard
from tests.tools.commands import BOARD, call, module_of, refused
from tests.tools.config_tools import tree
from tests.tools.ports import free_port

pytestmark = pytest.mark.more

SCRIPT = BOARD


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for run in ("tiny", "sweep/seed-1"):
        _write_events(tmp_path / "runs" / run)
    (tmp_path / "runs" / "site-packages" / "tensorboard").mkdir(parents=True)
    return tmp_path / "runs"


def _write_events(run: Path) -> None:
    (run / "tensorboard").mkdir(parents=True, exist_ok=True)
    (run / "tensorboard" / "events.out.tfevents.1").touch()


def _linked(root: Path, links: Path) -> dict[str, Path]:
    links.mkdir(exist_ok=True)
    module_of(SCRIPT).link_boards(root, links)
    return {link.name: link.readlink() for link in links.iterdir()}


def test_runs_are_named_after_their_folders(runs: Path, tmp_path: Path) -> None:
    tiny = runs / "tiny/tensorboard"
    assert _linked(runs, tmp_path / "all") == {"tiny": tiny, "sweep-seed-1": runs / "sweep/seed-1/tensorboard"}
    assert _linked(runs / "tiny", tmp_path / "one") == {"tiny": tiny}


def test_an_invalid_or_used_port_is_reported_before_an_address_is_shown(runs: Path) -> None:
    _write_events(runs / "one")
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        answer = call(SCRIPT, runs, f"--port={port}")
    refused(answer, f"--host=localhost --port={port}: cannot listen there", "give another port, such as --port=6007")
    assert answer.out == ""
    refused(call(SCRIPT, runs, "--port=70000"), "--port=70000: cannot listen there")


def test_the_short_address_shows_both_losses_and_a_point(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(validate(tree(), "the test")))
    board = TensorBoard(tmp_path / "run")
    board.open(0)
    board.write(5, {"eval/loss": 2.0})
    board.close()
    port = free_port()
    command = [sys.executable, "-m", "relora_mora", BOARD, str(tmp_path), f"--port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    points: list[list[float]] = []
    deadline = time.monotonic() + 60
    while not points:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
        with contextlib.suppress(OSError):  # it has not started, or not read the run
            values = f"http://localhost:{port}/data/plugin/scalars/scalars?run=run&tag=eval/loss"
            points = json.load(urlopen(values, timeout=10))
    first_page = urlopen(f"http://localhost:{port}", timeout=10).read().decode()
    process.terminate()
    printed, _ = process.communicate(timeout=30)
    assert (printed, process.returncode) == (f"http://localhost:{port}\n", 0)
    asked = parse_qs(first_page.partition("/?")[2].partition("#")[0])
    tags = [card["tag"] for card in json.loads(asked["pinnedCards"][0])]
    assert (tags, asked["smoothing"]) == (["eval/loss", "train/loss"], ["0"])
    assert [point[1:] for point in points] == [[5, 2.0]]
