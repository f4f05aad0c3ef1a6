"""Shows one or many runs in TensorBoard, named after their folders."""

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from relora_mora.cli.arguments import PositiveInt
from relora_mora.system.process import ending_with_me

PINNED = ("eval/perplexity", "train/perplexity")
NEW_RUNS_SECONDS = 10.0
LONGEST_NAME = 240  # in bytes; file systems allow 255, so there is room to make names unique


def main(runs: str, *, port: PositiveInt = 6006, host: str = "localhost") -> int:
    """Shows runs in TensorBoard.

    Both perplexities are pinned, and new runs appear automatically.

    Arguments:
        runs: a run folder, or a folder that contains run folders

    Options:
        port: the port to listen on
        host: the address to listen on; localhost: only this machine can connect; 0.0.0.0: any machine can

    Example:
        relora-mora board runs --port=6007
    """
    root = Path(runs)
    if not any(_runs(root)):
        expected = "a run folder, or a folder that contains run folders"
        raise ValueError(f"{runs}: no run with TensorBoard's files (tensorboard/events.*); give {expected}")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there ({error}); give another port, such as --port=6007"
        ) from error
    # TensorBoard names a run by its path below --logdir; links keep /tensorboard out of the names
    with tempfile.TemporaryDirectory(prefix="tensorboard-") as links:
        link_boards(root, Path(links))
        print(url(host, port), flush=True)
        # the loader of which tests/train/log/test_metrics.py shows that it hides what a resume repeats
        options = [f"--logdir={links}", "--load_fast=false", f"--host={host}", f"--port={port}"]
        with subprocess.Popen(ending_with_me(["-m", "tensorboard.main", *options])) as process:
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            while True:
                try:
                    return process.wait(timeout=NEW_RUNS_SECONDS)
                except subprocess.TimeoutExpired:
                    link_boards(root, Path(links))


def _runs(root: Path) -> Iterator[Path]:
    """All folders with TensorBoard's files, each once; checkpoints next to them may come and go meanwhile."""
    entered: set[Path] = set()
    for folder, below, _ in os.walk(root, followlinks=True):
        run = Path(folder)
        if run.resolve() in entered:
            below.clear()
            continue
        entered.add(run.resolve())
        if "tensorboard" in below and any((run / "tensorboard").glob("events.*")):
            yield run
        others = (name for name in below if name not in ("checkpoints", "tensorboard"))
        below[:] = sorted(others, key=lambda name: (Path(folder, name).is_symlink(), name))  # own names before links


def link_boards(root: Path, links: Path) -> None:
    """Adds links to new folders of event files, named after the run; a run in a/b is called a-b."""
    known = {link.readlink() for link in links.iterdir()}
    for run in sorted(_runs(root)):
        board = (run / "tensorboard").resolve()
        if board in known:
            continue
        name = "-".join(run.relative_to(root).parts) or root.resolve().name
        link = links / (os.fsencode(name)[-LONGEST_NAME:].decode(errors="ignore") or "_")
        while link.is_symlink():  # the names of a/b and a-b collide
            link = link.with_name(f"{link.name}_")
        link.symlink_to(board)


def url(host: str, port: int) -> str:
    """The address with pinned curves, and without smoothing, which would hide a merge's effect on a curve."""
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    shown = "localhost" if host == "0.0.0.0" else host  # noqa: S104 - it is only compared
    return f"http://{shown}:{port}/?pinnedCards={quote(pinned)}&smoothing=0#timeseries"
