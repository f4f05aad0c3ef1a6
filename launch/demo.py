"""All of it on one machine without a network: text, tokenizer, ReMoRA pretraining, evaluation, export, a sample.

`make demo` runs it. A second run goes on where the first one ended.
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
BATCH_SIZE = 16  # that config's train.batch_size
PROMPTS = ("The function returns", "If the argument is not", "This class")


def main() -> int:
    """Text, tokenizer, pretraining, evaluation, export and a sample, into runs/demo; what is there already is kept."""
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
        say(f"2/5 tokenizer: {tokenizer} is there already")
    else:
        step(
            "2/5 tokenizer: sentencepiece BPE with 8,192 pieces",
            [python, "tokenizer/train.py", f"--data={data}/train/*.json.gz", f"--out={tokenizer}", "--vocab_size=8192"],
        )
    ranks = _ranks()
    # not deepspeed, which reads no names of GPUs or MIG parts in CUDA_VISIBLE_DEVICES
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
        say(f"4/5 export: {export} is there already")
    else:
        step(
            "4/5 export: adapters merged, a plain LLaMA",
            [python, "launch/export.py", str(DEMO / "run"), str(export)],
        )
    say("5/5 the export continues text, with plain transformers")
    _generate()
    _report(time.monotonic() - begin)
    return 0


def _ranks() -> int:
    """Every local accelerator, rounded down to a power of two, which divides the batch; on CPUs two processes."""
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
    """A heading."""
    print(f"\n== {text}", flush=True)


def step(title: str, command: list[str], target: str = "demo", folder: Path = DEMO) -> None:
    """Shows and runs a command, one step of what ``make TARGET`` does in a folder.

    Where it fails the program ends, and after a Ctrl-C, for which the step has all the time that it takes to save.
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
    on = f"`make {target}` goes on from here, and after `rm -r {folder}` it begins anew"
    if stops:
        print(f"stopped; {on}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    if code:
        raise SystemExit(f"this step ended with code {code}; {on}")


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
Train on your own text:   README.md says how; configs/run/tiny_*.yaml train the five methods
Start again from nothing: rm -r {DEMO}""")


if __name__ == "__main__":
    run(main)
