"""The overhead of the trainer: tokens per second of launch/pretrain.py against bare loops, as one JSON line.

    python -m launch.benchmark trainer configs/run/tiny_remora_paper.yaml [--section.key=value ...]
        [--steps=25] [--rounds=3]

The text is the one of ``make demo``, which is created if it is missing, unless --data.train names another one.
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
from typing import Any, NamedTuple

from launch.benchmark.turns import medians, take_turns
from relora_mora.cli.arguments import PositiveInt
from relora_mora.config.load import ConfigError, dump, load_config
from relora_mora.config.schema import Config
from relora_mora.supervise.exits import REQUEUE
from relora_mora.system.process import ending_with_me
from relora_mora.system.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "runs" / "demo"
OURS = ("train.run_dir", "train.resume", "log.every_steps", "eval.every_steps", "eval.at_start")
PARTS = 5  # lines of metrics in a round; the steps before the first line do not count


def main(config: str, *, steps: int = 25, rounds: PositiveInt = 3, **overrides: str) -> None:
    """Measures four programs in turns, on the same first batches of the same data.

    trainer: launch/pretrain.py in a separate process, with data workers, metrics and TensorBoard. saving: the same with
    a checkpoint in the middle of the round, which shows the cost of one. engine: only the trainer's model and engine,
    on batches loaded beforehand. torch: the same in plain torch, AdamW on float32 masters, without DeepSpeed. The
    ratios are for the trainer with a checkpoint every checkpoint.every_steps.

    Args:
        config: a YAML file such as configs/run/tiny_remora_paper.yaml
        steps: optimizer steps of a round; the first fifth does not count
        rounds: rounds of each program; the medians count
        overrides: settings as --section.key=value
    """
    faults = [f"--{name}: set by this command; leave it out" for name in OURS if name in overrides]
    if steps < PARTS:
        faults.append(f"--steps: got {steps}, expected at least {PARTS}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        faults.append("this benchmark runs in one process; start it with python, without a launcher")
    if faults:
        raise ConfigError(faults, "the command line")
    settings = load_config(config, overrides, world_size=1)  # reports mistakes before the text is created
    if settings.train.epochs is not None:
        faults.append("--train.epochs: epochs are not supported here; give --train.epochs=null --train.steps=1000")
    elif steps >= settings.train.steps:
        faults.append(f"--steps: got {steps}, expected less than train.steps, which is {settings.train.steps}")
    for name in ("matrices", "others"):
        if (value := getattr(settings.optim, name)) != "adamw":
            faults.append(f"--optim.{name}: got {value}, but the loop of plain torch only has AdamW; set adamw")
    if faults:
        raise ConfigError(faults, "the command line")
    if "data.train" not in overrides:
        overrides = demo_text() | overrides
    with tempfile.TemporaryDirectory(prefix="benchmark_trainer-") as folder:
        # without evaluations, which would interrupt the steps of a round
        changes = {
            "train.run_dir": str(Path(folder, "bare")),
            "train.resume": "auto",
            "log.every_steps": str(steps // PARTS),
            "eval.every_steps": "0",
            "eval.at_start": "false",
        }
        run = load_config(config, overrides | changes, world_size=1)
        print(json.dumps(measure(run, Path(folder), steps, rounds)))


def demo_text() -> dict[str, str]:
    """The text and the tokenizer of ``make demo``, as settings."""
    commands = [["relora_mora.commands.demo_text", f"--out={DEMO / 'data'}"]]
    if not (DEMO / "tokenizer" / "tokenizer.model").exists():
        text = DEMO / "data" / "train" / "*.json.gz"
        out = DEMO / "tokenizer"
        commands.append(["relora_mora", "train-tokenizer", f"--data={text}", f"--out={out}", "--vocab_size=8192"])
    for command in commands:
        if subprocess.run([sys.executable, "-m", *command], stdout=sys.stderr, check=False).returncode:
            raise ValueError(
                f"{command[0]} failed, see above; "
                "give other text with --data.train, --data.validation and --tokenizer.path"
            )
    return {
        "data.train": str(DEMO / "data" / "train" / "*.json.gz"),
        "data.validation": str(DEMO / "data" / "validation" / "*.json.gz"),
        "tokenizer.path": str(DEMO / "tokenizer"),
    }


def measure(config: Config, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    import torch

    from launch.benchmark.bare import EngineLoop, TorchLoop, make_batches, seconds_of
    from relora_mora.engine.start import init_distributed
    from relora_mora.train.begin.check import check

    init_distributed()
    checked = check(config, world_size=1)
    skip = config.log.every_steps
    counted = steps - skip
    batches = make_batches(config, steps)
    engine = EngineLoop(checked)
    plain = TorchLoop(checked)
    rounds_of_trainer: list[TrainerRound] = []

    def trainer(checkpoint_every: int) -> float:
        run_dir = folder / f"round-{len(rounds_of_trainer)}"
        rounds_of_trainer.append(train(config, run_dir, steps, checkpoint_every))
        return rounds_of_trainer[-1].step_seconds

    turns = []
    for seconds in take_turns(  # seconds per step
        {
            "trainer": lambda: trainer(0),
            "saving": lambda: trainer(steps // 2 + 1),
            "engine": lambda: seconds_of(engine, batches, skip=skip) / counted,
            "torch": lambda: seconds_of(plain, batches, skip=skip) / counted,
        },
        rounds=rounds,
    ):
        turns.append(seconds)
        print(", ".join(f"{name} {value:.4f}" for name, value in seconds.items()) + " s a step", file=sys.stderr)
    step_seconds = medians(turns)
    checkpoint = max(0.0, step_seconds["saving"] - step_seconds["trainer"]) * counted
    every = config.checkpoint.every_steps
    whole = step_seconds["trainer"] + (checkpoint / every if every else 0.0)
    return {
        "model": config.model.config,
        "method": config.method.name,
        "precision": "bf16" if checked.bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "tokens_per_step": config.tokens_per_step,
        "measured_steps": counted,
        "step_seconds": {name: [seconds[name] for seconds in turns] for name in step_seconds},
        "tokens_per_second": {name: config.tokens_per_step / value for name, value in step_seconds.items()},
        "ratio": {name: step_seconds[name] / whole for name in ("engine", "torch")},
        "data_wait_seconds": statistics.mean(wait for one in rounds_of_trainer for wait in one.waits),
        "checkpoint_seconds": checkpoint,
        "checkpoint_stall_seconds": statistics.median(stall for one in rounds_of_trainer for stall in one.stalls),
    }


class TrainerRound(NamedTuple):
    """Seconds in one run of launch/pretrain.py: per step, of the waits for data, of the stalls for a checkpoint."""

    step_seconds: float
    waits: list[float]
    stalls: list[float]


def train(config: Config, run_dir: Path, steps: int, checkpoint_every: int) -> TrainerRound:
    """Starts the trainer as a user does and stops it after ``steps``; raises ValueError if it fails."""
    settings = run_dir.with_suffix(".yaml")
    output = run_dir.with_suffix(".log")
    settings.write_text(dump(config), encoding="utf-8")
    changes = [f"--train.run_dir={run_dir}", f"--checkpoint.every_steps={checkpoint_every}"]
    command = ending_with_me([str(ROOT / "launch" / "pretrain.py"), str(settings), *changes])
    with output.open("w", encoding="utf-8") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while process.poll() is None and not any(line["step"] >= steps for line in metrics(run_dir)):
                time.sleep(0.5)
        finally:
            process.terminate()
    lines = metrics(run_dir)
    if process.returncode not in (0, REQUEUE) or not any(line["step"] >= steps for line in lines):
        log_text = output.read_text(encoding="utf-8").strip()
        raise ValueError(f"launch/pretrain.py ended with code {process.returncode}: {log_text}")
    lines = [line for line in lines if line["step"] <= steps]
    first, *later = [line for line in lines if "train/loss" in line]
    stalls = "perf/checkpoint_stall_seconds"
    return TrainerRound(
        (later[-1]["time"] - first["time"]) / (later[-1]["step"] - first["step"]),
        [line["perf/data_wait_seconds"] for line in later],
        [line[stalls] for line in lines if stalls in line],
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The complete lines that a run has written so far."""
    path = RunFolder(run_dir).metrics
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
