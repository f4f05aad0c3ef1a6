"""Shows one or many runs in TensorBoard."""

import signal
import sys
import threading
from pathlib import Path

from relora_mora.cli.arguments import PositiveInt
from relora_mora.system.process import many_imports


def main(runs: str, *, port: PositiveInt = 6006, host: str = "localhost") -> None:
    """Shows runs in TensorBoard.

    New runs appear automatically.

    Arguments:
        runs: a run folder, or a folder that contains run folders

    Options:
        port: the port to listen on
        host: the address to listen on; localhost: only this machine can connect; 0.0.0.0: any machine can

    Example:
        relora-mora board runs --port=6007
    """
    if not any(path.parent.name == "tensorboard" for path in Path(runs).rglob("events.*")):
        expected = "a run folder, or a folder that contains run folders"
        raise ValueError(f"{runs}: no run with TensorBoard's files (tensorboard/events.*); give {expected}")
    with many_imports():
        from tensorboard import program

    board = program.TensorBoard()
    # the loader of which tests/train/log/test_metrics.py shows that it hides what a resume repeats
    board.configure(("", f"--logdir={runs}", "--load_fast=false", f"--host={host}", f"--port={port}"))
    try:
        board.launch()
    except (program.TensorBoardServerException, OSError, OverflowError) as error:
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there ({error}); give another port, such as --port=6007"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"http://{'localhost' if host == '0.0.0.0' else host}:{port}", flush=True)  # noqa: S104 - only compared
    threading.Event().wait()
