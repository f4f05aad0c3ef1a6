"""The whole way on one machine without a network: text, tokenizer, ReMoRA pretraining, evaluation, export, a sample.

A second run continues where the first one ended.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from relora_mora.cli.command import INTERRUPTED
from relora_mora.system.process import own_command
from relora_mora.system.run_folder import RunFolder, read_json_lines

DEMO = Path("runs/demo")
CONFIG = "demo"  # configs/run/demo.yaml
COMMAND = [sys.executable, "-m", "relora_mora"]
BATCH_SIZE = 8  # train.batch_size in CONFIG


def main(**overrides: str) -> int:
    """Goes the whole way on a small model, in minutes.

    It finds text on this machine, trains a tokenizer, pretrains a LLaMA of 7 million parameters, evaluates and exports
    it, and prints a sample. Everything is in runs/demo of the current folder. Steps that are done are not repeated.

    Arguments:
        overrides: settings of the pretraining, e.g. --train.steps=60

    Example:
        relora-mora demo
    """
    from relora_mora.config.load import load_config
    from relora_mora.train.begin.check import check_model

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begin = time.monotonic()
    data = DEMO / "data"
    tokenizer = DEMO / "tokenizer"
    export = DEMO / "export"
    ranks = _ranks()
    changes = {"train.micro_batch_size": str(BATCH_SIZE // ranks), **overrides}
    check_model(load_config(CONFIG, changes, world_size=ranks))  # a mistake is reported before anything is done
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
    # not deepspeed, which does not understand names of GPUs or MIG parts in CUDA_VISIBLE_DEVICES
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run"),
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc_per_node={ranks}",
    ]
    step(
        f"3/5 pretraining with ReMoRA, DeepSpeed ZeRO-2: {CONFIG}",
        [*launcher, "--module", "relora_mora", "pretrain", CONFIG, *settings],
    )
    if _is_newer(export / "config.json", RunFolder(DEMO / "run").checkpoints / "latest"):
        say(f"4/5 export: {export} already exists")
    else:
        shutil.rmtree(export, ignore_errors=True)
        step(
            "4/5 export: a plain LLaMA with merged adapters",
            [*COMMAND, "export", str(DEMO / "run"), str(export)],
        )
    step(
        "5/5 sample: the export continues a text",
        [*COMMAND, "sample", str(export), "The function returns", "--temperature=0.7", "--max_new_tokens=60"],
    )
    _report(time.monotonic() - begin)
    return 0


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


def step(title: str, command: list[str]) -> None:
    """Shows and runs a command, one step of the demo.

    The program ends if the step fails, or after Ctrl-C, when the step has taken all the time that it needs to save.
    """
    say(title)
    program, *arguments = command
    print(f"$ {shlex.join([Path(program).name, *arguments])}", flush=True)
    stops: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stops.append(number))
    try:
        code = subprocess.Popen(command).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    remedy = f"the same command continues from here; after `rm -r {DEMO}` it starts again from the beginning"
    if stops:
        print(f"stopped; {remedy}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    if code:
        raise SystemExit(f"this step ended with code {code}; {remedy}")


def _report(seconds: float) -> None:
    program = own_command()
    lines = read_json_lines(RunFolder(DEMO / "run").metrics)
    tag = "eval/perplexity"
    evaluations = [f"step {line['step']}: {line[tag]:.1f}" for line in lines if tag in line]
    merges = [line["step"] for line in lines if "merge/layers" in line]
    say(f"done in {seconds:.0f} s")
    print(f"validation perplexity: {', '.join(evaluations)}")
    if merges:  # the method may be another one
        print(f"{len(merges)} merges, after steps {merges[0]} to {merges[-1]}")
    print(f"""
Look at the curves:       {program} board {DEMO / "run"}
Score any text:           {program} evaluate {DEMO / "export"} --data='{DEMO}/data/validation/*.json.gz'
Compare the methods:      {program} pretrain tiny_remora, and tiny_full, tiny_lora, tiny_mora, tiny_relora
Start again from nothing: rm -r {DEMO}""")
