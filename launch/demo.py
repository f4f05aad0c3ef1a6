"""The whole way on one machine without a network: text, tokenizer, ReMoRA pretraining, evaluation, export, a sample.

`make demo` runs it. A second run continues where the first one ended.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from relora_mora.cli.command import INTERRUPTED, run
from relora_mora.system.run_folder import RunFolder, read_json_lines

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("runs/demo")
CONFIG = "configs/run/demo.yaml"
BATCH_SIZE = 16  # train.batch_size in CONFIG
PROMPTS = ("The function returns", "If the argument is not", "This class")


def main() -> int:
    """Text, tokenizer, pretraining, evaluation, export and a sample, in runs/demo; existing results are kept."""
    os.chdir(ROOT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begin = time.monotonic()
    python = sys.executable
    data = DEMO / "data"
    tokenizer = DEMO / "tokenizer"
    export = DEMO / "export"
    step(
        "1/5 text: docstrings and the language reference of this Python",
        [python, "launch/demo_text.py", f"--out={data}"],
    )
    if (tokenizer / "tokenizer.model").exists():
        say(f"2/5 tokenizer: {tokenizer} already exists")
    else:
        step(
            "2/5 tokenizer: sentencepiece BPE with 8,192 pieces",
            [python, "tokenizer/train.py", f"--data={data}/train/*.json.gz", f"--out={tokenizer}", "--vocab_size=8192"],
        )
    ranks = _ranks()
    # not deepspeed, which does not understand names of GPUs or MIG parts in CUDA_VISIBLE_DEVICES
    launcher = [
        *(python, "-m", "torch.distributed.run"),
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc_per_node={ranks}",
    ]
    step(
        f"3/5 pretraining with ReMoRA, DeepSpeed ZeRO-2: {CONFIG}",
        [*launcher, "launch/pretrain.py", CONFIG, f"--train.micro_batch_size={min(8, BATCH_SIZE // ranks)}"],
    )
    if (export / "config.json").exists():
        say(f"4/5 export: {export} already exists")
    else:
        step(
            "4/5 export: a plain LLaMA with merged adapters",
            [python, "launch/export.py", str(DEMO / "run"), str(export)],
        )
    say("5/5 sample: the export continues text, in plain transformers")
    _generate()
    _report(time.monotonic() - begin)
    return 0


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


def step(title: str, command: list[str], target: str = "demo", folder: Path = DEMO) -> None:
    """Shows and runs a command, one step of ``make TARGET``, which works in a folder.

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
    remedy = f"`make {target}` continues from here; after `rm -r {folder}` it starts again from the beginning"
    if stops:
        print(f"stopped; {remedy}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    if code:
        raise SystemExit(f"this step ended with code {code}; {remedy}")


def _generate() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO / "export")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "export")
    torch.manual_seed(0)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            **ids, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40, pad_token_id=tokenizer.eos_token_id
        )
        print("> " + " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split()), flush=True)


def _report(seconds: float) -> None:
    export = DEMO / "export"
    lines = read_json_lines(RunFolder(DEMO / "run").metrics)
    tag = "eval/perplexity"
    evaluations = [f"step {line['step']}: {line[tag]:.1f}" for line in lines if tag in line]
    merges = [line["step"] for line in lines if "merge/layers" in line]
    say(f"done in {seconds:.0f} s")
    print(f"validation perplexity: {', '.join(evaluations)}")
    print(f"{len(merges)} merges, after steps {merges[0]} to {merges[-1]}")
    print(f"""
Look at the curves:       .venv/bin/python launch/board.py {DEMO / "run"}
Score any text:           .venv/bin/python launch/evaluate.py {export} --data='{DEMO}/data/validation/*.json.gz'
Train on your own text:   see README.md; configs/run/tiny_*.yaml train the five methods
Start again from nothing: rm -r {DEMO}""")


if __name__ == "__main__":
    run(main)
