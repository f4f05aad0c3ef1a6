"""A stand-in for a training script, which writes the files of a run folder immediately.

A run ends by itself unless its rate is 1 (it fails) or 2 (it waits to be stopped, and ends well at its second start).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

REQUEUE = 75


def main() -> int:
    _, file = sys.argv
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    folder = Path(settings["train"]["run_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    rate = settings["optim"]["lr"]
    seed = settings["train"]["seed"]
    first = not (folder / "metrics.jsonl").exists()
    steps = settings["train"]["steps"]
    start: dict[str, object] = {
        "command": sys.argv,
        "commit": "abc",
        "host": "here",
        "threads": min(2, int(os.environ["OMP_NUM_THREADS"])),  # as on a machine with two cores
        "omp_num_threads": os.environ["OMP_NUM_THREADS"],
    }
    (folder / "config.yaml").write_text(yaml.dump(settings), encoding="utf-8")
    _append(folder / "starts.jsonl", {**start, "step": 0 if first else steps // 2})
    _append(folder / "metrics.jsonl", {"step": steps // 2, "time": time.time(), "train/loss": 5.0, "perf/mfu": 0.1})
    print("some words of the run", flush=True)
    if rate == 1:
        print("it diverged", flush=True)
        return 1
    if rate == 2 and first:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(REQUEUE))
        _append(folder / "ends.jsonl", {"code": REQUEUE})
        (folder / "pid").write_text(str(os.getpid()))
        (folder / "waits").touch()
        signal.pause()
    _append(folder / "metrics.jsonl", {"step": steps, "eval/loss": abs(rate - 3e-3) + seed / 100})
    _append(folder / "ends.jsonl", {"code": 0})
    return 0


def _append(path: Path, line: dict[str, object]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
