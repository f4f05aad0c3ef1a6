"""The whole way on one machine without a network: text, tokenizer, ReMoRA pretraining, evaluation, export, a sample.

A second run continues from the point at which the first one ended.
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
from relora_mora.system.process import ending_with_me, own_command
from relora_mora.system.run_folder import RunFolder, read_json_lines

DEMO = Path("runs/demo")
CONFIG = "demo"  # configs/run/demo.yaml
_AGAIN = f"the same command goes on from here, and after `rm -r {DEMO}` from the beginning"


def main(**overrides: str) -> int:
    """Goes the whole way on a small model, in minutes.

    It finds text on this machine, trains a tokenizer, pretrains a LLaMA of 7 million parameters, evaluates and exports
    it, and prints a sample. Everything is in runs/demo of the current folder. Text and tokenizer that are there are
    used again, and a run that was stopped continues.

    Arguments:
        overrides: settings of the pretraining, e.g. --train.steps=60

    Example:
        relora-mora demo
    """
    from relora_mora.commands.demo_text import write_text
    from relora_mora.config.load import load_config

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    begin = time.monotonic()
    data, tokenizer, export = (DEMO / name for name in ("data", "tokenizer", "export"))
    run = Path(load_config(CONFIG, overrides, world_size=1).train.run_dir)
    say("1/5 text: docstrings and the language reference of this Python")
    print(write_text(data), flush=True)
    if (tokenizer / "tokenizer.model").exists():
        say(f"2/5 tokenizer: {tokenizer} already exists")
    else:
        words = ["train-tokenizer", f"--data={data}/train/*.json.gz", f"--out={tokenizer}", "--vocab_size=8192"]
        step("2/5 tokenizer: sentencepiece BPE with 8,192 pieces", words)
    settings = [f"--{name}={value}" for name, value in overrides.items()]
    step(f"3/5 pretraining with ReMoRA: {CONFIG}", ["pretrain", CONFIG, *settings])
    shutil.rmtree(export, ignore_errors=True)
    step("4/5 export: a plain model with merged adapters", ["export", str(run), str(export)])
    words = ["sample", str(export), "The function returns", "--temperature=0.7", "--max_new_tokens=60"]
    step("5/5 sample: the export continues a text", words)
    say(f"done in {time.monotonic() - begin:.0f} s")
    _report(run)
    return 0


def say(text: str) -> None:
    """Prints a heading."""
    print(f"\n== {text}", flush=True)


def step(title: str, words: list[str]) -> None:
    """Shows and runs a command of relora-mora, one step of the demo, in a process of its own.

    The program ends if the step fails, or after Ctrl-C, when the step has taken all the time that it needs to save.
    """
    say(title)
    print(f"$ {shlex.join([own_command(), *words])}", flush=True)
    stops: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stops.append(number))
    try:
        code = subprocess.run(ending_with_me(["-m", "relora_mora", *words]), check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if stops or code:
        print(f"the step {'was stopped' if stops else f'ended with code {code}'}; {_AGAIN}", file=sys.stderr)
        raise SystemExit(INTERRUPTED if stops else code)


def _report(run: Path) -> None:
    program = own_command()
    lines = read_json_lines(RunFolder(run).metrics)
    tag = "eval/perplexity"
    print("validation perplexity:", ", ".join(f"step {line['step']}: {line[tag]:.1f}" for line in lines if tag in line))
    if merges := [line["step"] for line in lines if "merge/layers" in line]:  # the method may be another one
        print(f"{len(merges)} merges, after steps {merges[0]} to {merges[-1]}")
    print(f"""
Look at the curves:       {program} board {run}
Score any text:           {program} evaluate {DEMO / "export"} --data='{DEMO}/data/validation/*.json.gz'
Compare the methods:      {program} pretrain tiny_remora  # and tiny_full, tiny_lora, tiny_mora, tiny_relora
Start again from nothing: rm -r {DEMO}""")
