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

from relora_mora.commands.board import link_boards
from relora_mora.config.load import dump, validate
from relora_mora.train.log.loggers import TensorBoard
from tests.tools.commands import BOARD, call, refused
from tests.tools.config_tools import tree
from tests.tools.ports import free_port

pytestmark = pytest.mark.more


def test_runs_are_named_after_their_folders(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    boards = {"tiny": runs / "tiny/tensorboard", "sweep-seed-1": runs / "sweep/seed-1/tensorboard"}
    for board in boards.values():
        board.mkdir(parents=True)
        (board / "events.out.tfevents.1").touch()
    (runs / "site-packages" / "tensorboard").mkdir(parents=True)
    for root, expected in ((runs, boards), (runs / "tiny", {"tiny": boards["tiny"]})):
        links = tmp_path / f"links of {root.name}"
        links.mkdir()
        assert link_boards(root, links)
        assert {link.name: link.readlink() for link in links.iterdir()} == expected


def test_an_invalid_or_used_port_is_reported_before_an_address_is_shown(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        answer = call(BOARD, tmp_path, f"--port={port}")
    refused(answer, f"--host=localhost --port={port}: cannot listen there", "give another port, such as --port=6007")
    assert answer.out == ""
    refused(call(BOARD, tmp_path, "--port=70000"), "--port=70000: cannot listen there")


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
