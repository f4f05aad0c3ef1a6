"""relora-mora board: TensorBoard shows the points of a run at the printed address."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from relora_mora.config.load import dump, validate
from relora_mora.train.log.loggers import TensorBoard
from tests.tools.commands import BOARD, call, refused
from tests.tools.config_tools import tree
from tests.tools.ports import free_port

pytestmark = pytest.mark.more


def test_runs_are_shown_on_a_free_port(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(validate(tree(), "the test")))
    board = TensorBoard(tmp_path / "run")
    board.open(0)
    board.write(5, {"eval/loss": 2.0})
    board.close()
    with socket.create_server(("localhost", 0)) as taken:
        for port in (taken.getsockname()[1], 70000):
            answer = call(BOARD, tmp_path, f"--port={port}")
            refused(answer, f"--host=localhost --port={port}: cannot listen there", "give another port")
            assert answer.out == ""
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
            values = f"http://localhost:{port}/data/plugin/scalars/scalars?run=run/tensorboard&tag=eval/loss"
            points = json.load(urlopen(values, timeout=10))
    process.terminate()
    printed, _ = process.communicate(timeout=30)
    assert (printed, process.returncode) == (f"http://localhost:{port}\n", 0)
    assert [point[1:] for point in points] == [[5, 2.0]]
