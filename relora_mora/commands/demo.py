"""The whole way on one machine without a network: text, tokenizer, ReMoRA pretraining, evaluation, export, a sample.

A second run continues where the first one ended.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from relora_mora.cli.command import INTERRUPTED, USER_ERROR
from relora_mora.supervise.exits import LOST, REQUEUE
from relora_mora.system.bars import Bar
from relora_mora.system.logs import counted
from relora_mora.system.process import ending_with_me, many_imports, own_command
from relora_mora.system.run_folder import RunFolder, read_json_lines

DEMO = Path("runs/demo")
CONFIG = "demo"  # configs/run/demo.yaml
COMMAND = [sys.executable, "-m", "relora_mora"]
BATCH_SIZE = 8  # train.batch_size in CONFIG
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # after a rank has failed


def main(**overrides: str) -> int:
    """Goes the whole way on a small model, in minutes.

    It finds text on this machine, trains a tokenizer, pretrains a LLaMA of 7 million parameters, evaluates and exports
    it, and prints a sample. Everything is in runs/demo of the current folder. Steps that are done are not repeated.

    Arguments:
        overrides: settings of the pretraining, e.g. --train.steps=60

    Example:
        relora-mora demo
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begin = time.monotonic()
    data = DEMO / "data"
    tokenizer = DEMO / "tokenizer"
    export = DEMO / "export"
    with many_imports():
        ranks = _ranks()
    changes = {"train.micro_batch_size": str(BATCH_SIZE // ranks), **overrides}
    run = _checked_run(changes, ranks)
    step(
        "1/5 text: docstrings and the language reference of this Python",
        [sys.executable, "-m", "relora_mora.commands.demo_text", f"--out={data}"],
    )
    if (tokenizer / "tokenizer.model").exists():
        say(f"2/5 tokenizer: {tokenizer} already exists")
    else:
        step(
            "2/5 tokenizer: sentencepiece BPE with 8,192 pieces",
            [*COMMAND, "train-tokenizer", f"--data={data}/train/*.json.gz", f"--out={tokenizer}", "--vocab_size=8192"],
        )
    settings = [f"--{name}={value}" for name, value in changes.items()]
    step(
        f"3/5 pretraining with ReMoRA, DeepSpeed ZeRO-2, as {counted(ranks, 'rank')}: {CONFIG}",
        [*COMMAND, "pretrain", CONFIG, *settings],
        ranks,
    )
    if _is_newer(export / "config.json", RunFolder(run).checkpoints / "latest"):
        say(f"4/5 export: {export} already exists")
    else:
        shutil.rmtree(export, ignore_errors=True)
        step(
            "4/5 export: a plain model with merged adapters",
            [*COMMAND, "export", str(run), str(export)],
        )
    step(
        "5/5 sample: the export continues a text",
        [*COMMAND, "sample", str(export), "The function returns", "--temperature=0.7", "--max_new_tokens=60"],
    )
    _report(run, time.monotonic() - begin)
    return 0


def _checked_run(changes: dict[str, str], ranks: int) -> Path:
    """The run folder in the settings. Raises a ValueError for every mistake that can be found before there is text."""
    from relora_mora.config.load import ConfigError, load_config

    config = load_config(CONFIG, changes, world_size=ranks)
    with many_imports():
        from relora_mora.train.begin.inputs import check_settings
        from relora_mora.train.begin.text import open_text

    try:
        with Bar("checking the settings"):
            check_settings(config, ranks)
            open_text(config)
    except ConfigError as error:
        faults = [fault for fault in error.faults if f"{DEMO}/" not in fault]  # the next steps make these files
        if faults:
            raise ConfigError(faults, error.source) from None
    return Path(config.train.run_dir)


def _is_newer(file: Path, other: Path) -> bool:
    """Whether the file exists, and was not written before the other one."""
    return file.exists() and other.exists() and file.stat().st_mtime >= other.stat().st_mtime


def _ranks() -> int:
    """The number of local accelerators, rounded down to a power of two, which divides the batch; two on CPUs."""
    import torch

    from relora_mora.system.hardware import uses_cuda

    ranks = 2
    if uses_cuda():
        ranks = 1 << (min(torch.cuda.device_count(), BATCH_SIZE).bit_length() - 1)
    else:
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return ranks


def say(text: str) -> None:
    """Prints a heading."""
    print(f"\n== {text}", flush=True)


def step(title: str, command: list[str], ranks: int = 1) -> None:
    """Shows and runs a command, one step of the demo, in as many processes as there are ranks.

    The program ends if the step fails, or after Ctrl-C, when the step has taken all the time that it needs to save.
    """
    say(title)
    program, *arguments = command
    print(f"$ {shlex.join([Path(program).name, *arguments])}", flush=True)
    stops: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stops.append(number))
    try:
        code = _run(arguments, ranks)
    finally:
        signal.signal(signal.SIGINT, before)
    again = f"after `rm -r {DEMO}` it starts again from the beginning"
    if stops:
        print(f"stopped; the same command continues from here; {again}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    if code == USER_ERROR:  # the step has said what is wrong
        raise SystemExit(code)
    if code:
        continues = "the same command continues from here; " * (code in (LOST, REQUEUE) or code < 0)
        raise SystemExit(f"this step ended with code {code}; {continues}{again}")


def _run(arguments: list[str], ranks: int) -> int:
    """Runs Python as every rank; returns the exit code of the first that failed, or 0.

    No launcher is needed on one machine. torchrun would show a traceback of its own around a message, and deepspeed
    does not understand names of GPUs or MIG parts in CUDA_VISIBLE_DEVICES.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    all_well = time.monotonic()
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, **meeting} if ranks > 1 else {}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(ending_with_me(arguments), env=environment))
    code = 0
    while True:
        running = [process for process in processes if process.poll() is None]
        code = code or next((process.returncode for process in processes if process.returncode), 0)
        if not running:
            return code
        if code in (0, REQUEUE):
            all_well = time.monotonic()
        elif time.monotonic() - all_well > GRACE_SECONDS:  # they wait for the rank that failed
            for process in running:
                process.terminate()
        time.sleep(POLL_SECONDS)


def _report(run: Path, seconds: float) -> None:
    program = own_command()
    lines = read_json_lines(RunFolder(run).metrics)
    tag = "eval/perplexity"
    evaluations = [f"step {line['step']}: {line[tag]:.1f}" for line in lines if tag in line]
    merges = [line["step"] for line in lines if "merge/layers" in line]
    say(f"done in {seconds:.0f} s")
    print(f"validation perplexity: {', '.join(evaluations)}")
    if merges:  # the method may be another one
        print(f"{len(merges)} merges, after steps {merges[0]} to {merges[-1]}")
    print(f"""
Look at the curves:       {program} board {run}
Score any text:           {program} evaluate {DEMO / "export"} --data='{DEMO}/data/validation/*.json.gz'
Compare the methods:      {program} pretrain tiny_remora  # and tiny_full, tiny_lora, tiny_mora, tiny_relora
Start again from nothing: rm -r {DEMO}""")
