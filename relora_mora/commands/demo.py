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

from relora_mora.cli.command import INTERRUPTED, USER_ERROR
from relora_mora.supervise.exits import FAILED, LOST, REQUEUE
from relora_mora.system.bars import Bar
from relora_mora.system.process import ending_with_me, many_imports, own_command
from relora_mora.system.run_folder import RunFolder, read_json_lines

DEMO = Path("runs/demo")
CONFIG = "demo"  # configs/run/demo.yaml
_AGAIN = f"after `rm -r {DEMO}` it starts again from the beginning"


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

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    begin = time.monotonic()
    data, tokenizer, export = (DEMO / name for name in ("data", "tokenizer", "export"))
    run = _checked_run(overrides)
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


def _checked_run(changes: dict[str, str]) -> Path:
    """The run folder in the settings. Raises a ValueError for every mistake that can be found before there is text."""
    from relora_mora.config.load import ConfigError, load_config

    config = load_config(CONFIG, changes, world_size=1)
    with many_imports():
        from relora_mora.train.begin.inputs import open_text
        from relora_mora.train.begin.settings import check_settings

    try:
        with Bar("checking the settings"):
            check_settings(config, 1)
            open_text(config)
    except ConfigError as error:
        faults = [fault for fault in error.faults if f"{DEMO}/" not in fault]  # the next steps make these files
        if faults:
            raise ConfigError(faults, error.source) from None
    return Path(config.train.run_dir)


def say(text: str) -> None:
    """Prints a heading."""
    print(f"\n== {text}", flush=True)


def step(title: str, words: list[str]) -> None:
    """Shows and runs a command of relora-mora, one step of the demo, in a process of its own.

    The program ends if the step fails, or after Ctrl-C, when the step has taken all the time that it needs to save.
    """
    say(title)
    print(f"$ {own_command()} {shlex.join(words)}", flush=True)
    stops: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stops.append(number))
    try:
        code = subprocess.run(ending_with_me(["-m", "relora_mora", *words]), check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    continues = "the same command continues from here; "
    if stops:
        print(f"stopped; {continues}{_AGAIN}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    if code == USER_ERROR:  # the step has said what is wrong
        raise SystemExit(code)
    if code:
        remedy = continues + _AGAIN if code in (LOST, REQUEUE) or code < 0 else _AGAIN
        print(f"this step ended with code {code}; {remedy}", file=sys.stderr)
        raise SystemExit(FAILED)


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
Compare the methods:      {program} pretrain tiny_remora  # and tiny_full, tiny_lora, all three with Muon
Start again from nothing: rm -r {DEMO}""")
