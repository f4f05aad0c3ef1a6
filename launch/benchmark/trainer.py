"""The trainer's own share of the time: tokens per second of launch/pretrain.py against bare loops; one JSON line.

    python -m launch.benchmark trainer configs/run/tiny_remora.yaml [--section.key=value ...] [--steps=25] [--rounds=3]

The text is that of ``make demo``, which is made where it is missing, unless --data.train names another.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from relora_mora.cli import run
from relora_mora.config import Config, ConfigError, dump, load_config
from relora_mora.supervise import REQUEUE

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "runs" / "demo"
OURS = ("train.run_dir", "train.resume", "log.every_steps", "eval.every_steps", "eval.at_start")
PARTS = 5  # lines of metrics in a round; the steps before the first do not count


def main(config: str, *, steps: int = 25, rounds: int = 3, **overrides: str) -> None:
    """Rounds of four, in turns, on the same first batches of the same data.

    trainer: launch/pretrain.py as a process of its own, with data workers, metrics and TensorBoard. saving: the same with a checkpoint
    in the middle of the round, so that the time of one is known. engine: the trainer's model and engine, on batches made beforehand,
    and nothing else. torch: the same with plain torch, AdamW on float32 masters and no DeepSpeed. The ratios are those of the trainer
    with a checkpoint every checkpoint.every_steps.

    Args:
        config: a YAML file such as configs/run/tiny_remora.yaml
        steps: optimizer steps of a round; the first fifth does not count
        rounds: rounds of each; medians count
        overrides: settings as --section.key=value
    """
    faults = [f"--{name}: set by this command; leave it out" for name in OURS if name in overrides]
    if steps < PARTS:
        faults.append(f"--steps: {steps}, expected at least {PARTS}")
    if rounds < 1:
        faults.append(f"--rounds: {rounds}, expected at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        faults.append("runs on one process; start it with python, without a launcher")
    if faults:
        raise ConfigError(faults, "the command line")
    length = load_config(config, overrides, world_size=1).train.steps  # mistakes are shown before the text is made
    if steps >= length:
        raise ConfigError([f"--steps: {steps}, expected less than train.steps, {length}"], "the command line")
    if "data.train" not in overrides:
        overrides = demo_text() | overrides
    with tempfile.TemporaryDirectory(prefix="benchmark_trainer-") as folder:
        print(json.dumps(measure(run_settings(config, overrides, steps, Path(folder)), Path(folder), steps, rounds)))


def demo_text() -> dict[str, str]:
    """The text and the tokenizer of ``make demo``, as settings."""
    commands = [["launch/demo_text.py", f"--out={DEMO / 'data'}"]]
    if not (DEMO / "tokenizer" / "tokenizer.model").exists():
        text, out = DEMO / "data" / "train" / "*.json.gz", DEMO / "tokenizer"
        commands.append(["tokenizer/train.py", f"--data={text}", f"--out={out}", "--vocab_size=8192"])
    for script, *arguments in commands:
        if subprocess.run([sys.executable, str(ROOT / script), *arguments], stdout=sys.stderr, check=False).returncode:
            raise ValueError(
                f"{script} failed, see above; give other text with --data.train, --data.validation and --tokenizer.path"
            )
    return {
        "data.train": str(DEMO / "data" / "train" / "*.json.gz"),
        "data.validation": str(DEMO / "data" / "validation" / "*.json.gz"),
        "tokenizer.path": str(DEMO / "tokenizer"),
    }


def run_settings(config: str, overrides: dict[str, str], steps: int, folder: Path) -> Config:
    """The run's settings; what would come between the steps of a round is left out, but a checkpoint."""
    ours = {
        "train.run_dir": str(folder / "bare"),
        "train.resume": "auto",
        "log.every_steps": str(steps // PARTS),
        "eval.every_steps": "0",
        "eval.at_start": "false",
    }
    return load_config(config, overrides | ours, world_size=1)


def measure(config: Config, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    import torch

    from launch.benchmark.bare import EngineLoop, Loop, TorchLoop, make_batches, seconds_of
    from relora_mora.train.check import check
    from relora_mora.zero import init_distributed

    init_distributed()
    checked = check(config, world_size=1)
    skip, batches = config.log.every_steps, make_batches(config, steps)
    loops: dict[str, Loop] = {"engine": EngineLoop(checked), "torch": TorchLoop(checked)}
    seconds: dict[str, list[float]] = {name: [] for name in ("trainer", "saving", *loops)}  # of a step
    stalls, waits = [], []
    for turn in range(rounds):
        for name, saves_every in (("trainer", 0), ("saving", steps // 2 + 1)):
            lines = train(config, folder / f"{name}-{turn}", steps, saves_every)
            logged = [line for line in lines if "train/loss" in line]
            seconds[name].append((logged[-1]["time"] - logged[0]["time"]) / (logged[-1]["step"] - logged[0]["step"]))
            waits += [line["perf/data_wait_seconds"] for line in logged[1:]]
            stalls += [
                line["perf/checkpoint_stall_seconds"] for line in lines if "perf/checkpoint_stall_seconds" in line
            ]
        for name, loop in loops.items():
            seconds[name].append(seconds_of(loop, batches, skip=skip) / (steps - skip))
        print(", ".join(f"{name} {values[-1]:.4f}" for name, values in seconds.items()) + " s a step", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    checkpoint = max(0.0, medians["saving"] - medians["trainer"]) * (steps - skip)
    every = config.checkpoint.every_steps
    whole = medians["trainer"] + (checkpoint / every if every else 0.0)
    return {
        "model": config.model.config,
        "method": config.method.name,
        "precision": "bf16" if checked.bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "tokens_per_step": config.tokens_per_step,
        "measured_steps": steps - skip,
        "step_seconds": seconds,
        "tokens_per_second": {name: config.tokens_per_step / value for name, value in medians.items()},
        "ratio": {name: medians[name] / whole for name in loops},
        "data_wait_seconds": statistics.mean(waits),
        "checkpoint_seconds": checkpoint,
        "checkpoint_stall_seconds": statistics.median(stalls),
    }


def train(config: Config, run_dir: Path, steps: int, checkpoint_every: int) -> list[dict[str, Any]]:
    """A round of the trainer, as a user starts it, and asked to stop when it has made the steps; the lines of its metrics until there."""
    settings, output = run_dir.with_suffix(".yaml"), run_dir.with_suffix(".log")
    lines: list[dict[str, Any]] = []
    settings.write_text(dump(config), encoding="utf-8")
    changes = [f"--train.run_dir={run_dir}", f"--checkpoint.every_steps={checkpoint_every}"]
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), str(settings), *changes]
    with output.open("w", encoding="utf-8") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None and not (lines := [line for line in metrics(run_dir) if line["step"] >= steps]):
            time.sleep(0.5)
        process.terminate()
    if process.returncode not in (0, REQUEUE) or not lines:
        raise ValueError(
            f"launch/pretrain.py ended with code {process.returncode}: {output.read_text(encoding='utf-8').strip()}"
        )
    return [line for line in metrics(run_dir) if line["step"] <= steps]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines that a run has written so far."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    run(main)
