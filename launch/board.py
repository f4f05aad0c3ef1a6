"""TensorBoard of one run or many, under the names of their folders: ``python launch/board.py runs``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

try:
    from relora_mora.cli.arguments import PositiveInt
    from relora_mora.cli.command import run
    from relora_mora.system.process import ending_with_me
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None

PINNED = ("eval/perplexity", "train/perplexity")
NEW_RUNS_SECONDS = 10.0
LONGEST_NAME = 240  # bytes, and some more to tell names apart: file systems allow 255


def main(runs: str, *, port: PositiveInt = 6006, host: str = "localhost") -> int:
    """Shows runs in TensorBoard, with both perplexities pinned; new runs appear by themselves.

    Args:
        runs: a run folder, or a folder with run folders in it
        port: that the browser asks
        host: localhost: only this machine can see it; 0.0.0.0: every machine that reaches this one
    """
    root = Path(runs)
    if not any(_runs(root)):
        expected = "a run folder, or one that holds run folders"
        raise ValueError(f"{runs}: no run with TensorBoard's files (tensorboard/events.*); give {expected}")
    _check_address(host, port)
    # TensorBoard names a run by its path below --logdir: with links to the folders no name ends with /tensorboard
    with tempfile.TemporaryDirectory(prefix="tensorboard-") as links:
        link_boards(root, Path(links))
        print(url(host, port), flush=True)
        # the fast loader drops the second of two points of a step, which relora_mora/train/tensorboard.py needs
        options = [f"--logdir={links}", "--load_fast=false", f"--host={host}", f"--port={port}"]
        with subprocess.Popen(ending_with_me(["-m", "tensorboard.main", *options])) as process:
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            while True:
                try:
                    return process.wait(timeout=NEW_RUNS_SECONDS)
                except subprocess.TimeoutExpired:
                    link_boards(root, Path(links))


def _check_address(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: cannot be listened at ({error}); give another port, such as --port=6007"
        ) from error


def _runs(root: Path) -> Iterator[Path]:
    """Folders with files of TensorBoard, also while checkpoints come and go beside them; each once."""
    seen: set[Path] = set()
    for follows in (False, True):  # a folder's own name comes before that of a link to it
        entered: set[Path] = set()
        for folder, below, _ in os.walk(root, followlinks=follows):
            real = Path(folder).resolve()
            if real in entered:
                below.clear()
                continue
            entered.add(real)
            if real not in seen and "tensorboard" in below and any(Path(folder, "tensorboard").glob("events.*")):
                seen.add(real)
                yield Path(folder)
            below[:] = [name for name in below if name not in ("checkpoints", "tensorboard")]


def link_boards(root: Path, links: Path) -> None:
    """Links the folders of event files that are not linked yet, by the run's name; a run in a/b is called a-b."""
    known = {link.readlink() for link in links.iterdir()}
    for run in sorted(_runs(root)):
        board = (run / "tensorboard").resolve()
        if board in known:
            continue
        name = "-".join(run.relative_to(root).parts) or root.resolve().name
        link = links / (os.fsencode(name)[-LONGEST_NAME:].decode(errors="ignore") or "_")
        while link.is_symlink():  # of a/b and a-b
            link = link.with_name(f"{link.name}_")
        link.symlink_to(board)


def url(host: str, port: int) -> str:
    """With the pinned curves, and without smoothing, which would hide what a merge does to a curve."""
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    shown = "localhost" if host == "0.0.0.0" else host  # noqa: S104 - it is only compared
    return f"http://{shown}:{port}/?pinnedCards={quote(pinned)}&smoothing=0#timeseries"


if __name__ == "__main__":
    run(main)
