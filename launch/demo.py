"""The whole main job on one machine and without a network: text, tokenizer, ReMoRA pretraining, evaluation, export, a sample.

`make demo` runs it. What is done stays done: a second run goes on where the first one ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from relora_mora.system.run_folder import RunFolder, read_json_lines

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("runs/demo")
CONFIG = "configs/run/demo.yaml"
PROMPTS = ("The function returns", "If the argument is not", "This class")


def main() -> int:
    os.chdir(ROOT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begin = time.monotonic()
    text = [sys.executable, "launch/demo_text.py", f"--out={DEMO / 'data'}"]
    tokenizer = [
        sys.executable,
        "tokenizer/train.py",
        f"--data={DEMO}/data/train/*.json.gz",
        f"--out={DEMO / 'tokenizer'}",
        "--vocab_size=8192",
    ]
    _run("1/5 text: docstrings and the language reference of this Python", text)
    if not (DEMO / "tokenizer" / "tokenizer.model").exists():
        _run("2/5 tokenizer: sentencepiece BPE with 8,192 pieces", tokenizer)
    else:
        _say("2/5 tokenizer: is there already")
    launcher = _launcher()
    ranks = int(launcher[-1].partition("=")[2])
    _run(
        f"3/5 pretraining with ReMoRA, DeepSpeed ZeRO-2: {CONFIG}",
        [*launcher, "launch/pretrain.py", CONFIG, f"--train.micro_batch_size={min(8, 16 // ranks)}"],
    )
    if not (DEMO / "export" / "config.json").exists():
        _run(
            "4/5 export: adapters merged, a plain LLaMA",
            [sys.executable, "launch/export.py", str(DEMO / "run"), str(DEMO / "export")],
        )
    else:
        _say(f"4/5 export: {DEMO / 'export'} is there already")
    _say("5/5 the export continues text, with plain transformers")
    _generate()
    _report(time.monotonic() - begin)
    return 0


def _launcher() -> list[str]:
    """DeepSpeed's launcher: every local accelerator, or two processes on the CPU with a thread each."""
    import torch

    deepspeed = [str(Path(sys.executable).parent / "deepspeed")]
    if torch.cuda.is_available():  # as many accelerators as divide the 16 sequences of a step
        ranks = 1 << (min(torch.cuda.device_count(), 16).bit_length() - 1)
        return [*deepspeed, f"--num_gpus={ranks}"]
    cores = len(os.sched_getaffinity(0))
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, cores // 2))}
    return [*deepspeed, "--num_gpus=2"]


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _run(title: str, command: list[str]) -> None:
    _say(title)
    shown = [Path(part).name if i == 0 else part for i, part in enumerate(command)]
    print("$ " + " ".join(shown), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"this step ended with code {code}; run `make demo` again to go on from here")


def _generate() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "export")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "export")
    torch.manual_seed(0)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            **ids, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40, pad_token_id=tokenizer.eos_token_id
        )
        print("> " + " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split()), flush=True)


def _report(seconds: float) -> None:
    lines = read_json_lines(RunFolder(DEMO / "run").metrics)
    evals = [line for line in lines if "eval/perplexity" in line]
    merges = [line["step"] for line in lines if "merge/layers" in line]
    _say(f"done in {seconds:.0f} s")
    print(
        "validation perplexity: " + ", ".join(f"step {line['step']}: {line['eval/perplexity']:.1f}" for line in evals)
    )
    print(f"merges after steps {', '.join(map(str, merges))}")
    print(f"""
Look at the curves:       .venv/bin/tensorboard --logdir {DEMO / "run"} --host localhost
Score any text:           .venv/bin/python launch/evaluate.py {DEMO / "export"} --data='{DEMO}/data/validation/*.json.gz'
Train longer, your text:  see "Five minutes" in README.md; configs/run/tiny_*.yaml compare the five methods
Start again from nothing: rm -r {DEMO}""")


if __name__ == "__main__":
    raise SystemExit(main())
