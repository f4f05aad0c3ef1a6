"""Shows one or many runs in TensorBoard, named after their folders."""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote
from wsgiref.types import StartResponse, WSGIApplication

from relora_mora.cli.arguments import PositiveInt
from relora_mora.system.process import many_imports

PINNED = ("eval/loss", "train/loss")  # not perplexities: the first ones are so high that the others look equal
NEW_RUNS_SECONDS = 10.0


def main(runs: str, *, port: PositiveInt = 6006, host: str = "localhost") -> None:
    """Shows runs in TensorBoard.

    Both losses are pinned, and new runs appear automatically.

    Arguments:
        runs: a run folder, or a folder that contains run folders

    Options:
        port: the port to listen on
        host: the address to listen on; localhost: only this machine can connect; 0.0.0.0: any machine can

    Example:
        relora-mora board runs --port=6007
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there ({error}); give another port, such as --port=6007"
        ) from error
    # TensorBoard names a run by its path below --logdir; links keep /tensorboard out of the names
    with tempfile.TemporaryDirectory(prefix="tensorboard-") as links:
        if not link_boards(Path(runs), Path(links)):
            expected = "a run folder, or a folder that contains run folders"
            raise ValueError(f"{runs}: no run with TensorBoard's files (tensorboard/events.*); give {expected}")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        _serve(links, host, port)
        print(f"http://{'localhost' if host == '0.0.0.0' else host}:{port}", flush=True)  # noqa: S104 - only compared
        while True:
            time.sleep(NEW_RUNS_SECONDS)
            link_boards(Path(runs), Path(links))


def _serve(logdir: str, host: str, port: int) -> None:
    """Starts TensorBoard in threads of this process."""
    with many_imports():
        from tensorboard import program

    class Server(program.WerkzeugServer):  # type: ignore[misc]
        def __init__(self, app: WSGIApplication, flags: object) -> None:
            super().__init__(with_curves(app), flags)

    tensorboard = program.TensorBoard(server_class=Server)
    # the loader of which tests/train/log/test_metrics.py shows that it hides what a resume repeats
    tensorboard.configure(("", f"--logdir={logdir}", "--load_fast=false", f"--host={host}", f"--port={port}"))
    tensorboard.launch()


def with_curves(app: WSGIApplication) -> WSGIApplication:
    """TensorBoard with pinned curves on its first page.

    Smoothing would hide a merge's effect, and the scaling without outliers hides the best of a few evaluations.
    """
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    page = (
        "<!doctype html><script>localStorage._tb_global_settings ??= '{\"ignoreOutliers\": false}'\n"
        f"location.replace('/?pinnedCards={quote(pinned)}&smoothing=0#timeseries')</script>"
    )

    def answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/" or environ["QUERY_STRING"]:
            return app(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/html")])
        return [page.encode()]

    return answer


def link_boards(root: Path, links: Path) -> bool:
    """Adds links to new folders of event files, named after the run; a run in a/b is called a-b. Whether there are any.

    Checkpoints next to them may come and go meanwhile.
    """
    known = {link.readlink() for link in links.iterdir()}
    for folder, _, names in os.walk(root):
        board = Path(folder).resolve()
        if board.name != "tensorboard" or board in known or not any(name.startswith("events.") for name in names):
            continue
        link = links / ("-".join(Path(folder).parent.relative_to(root).parts) or root.resolve().name)
        while link.is_symlink():  # the names of a/b and a-b collide
            link = link.with_name(f"{link.name}_")
        link.symlink_to(board)
    return any(links.iterdir())
