"""Fine-tuning on one machine: a pretrained LLaMA memorizes pairs of UUIDs, with MoRA and with LoRA.

`make demo-finetune` runs it. A second run continues where the first one ended. The model is SmolLM2-135M-Instruct from
the package index or, if it is not available, the model that `make demo` trains.
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

from smollm2 import PACKAGES  # launch/smollm2.py

from relora_mora.cli.command import run
from relora_mora.commands import demo
from relora_mora.commands.demo import COMMAND, say
from relora_mora.system.process import own_command

if TYPE_CHECKING:
    from relora_mora.experiments.compare.groups import Group

ROOT = Path(__file__).resolve().parent.parent
HOME = Path("runs/demo_finetune")
CONFIG = "configs/run/demo_finetune.yaml"
PAIRS = 16  # train.batch_size in CONFIG
NAMES = {"mora": "MoRA", "lora": "LoRA"}
REACHED = ("eval/character_accuracy", (0.5, 0.95))  # the table shows the steps at which these are reached
# learning rates that suit each method and model; the demo's small model with many tokens also needs other settings
RATES = {"mora": "2e-3", "lora": "5e-3"}
RATES_OF_DEMO = {"mora": "5e-3", "lora": "2e-2"}
OF_DEMO: dict[str, object] = {"data.sequence_length": 128, "train.epochs": 300, "eval.every_steps": 20}
ENGLISH = "What is the capital of France?"


@dataclass(frozen=True)
class Start:
    """The initial model, the folder for all results, the learning rate of each method, and further settings."""

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
    """Model, pairs, two runs, their curves, an export and a chat, in runs/demo_finetune; existing results are kept."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib: not installed; run make demo-finetune, or pip install -e '.[plot]'")
    os.chdir(ROOT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begin = time.monotonic()
    python = sys.executable
    start = _start()
    pairs = HOME / "pairs.jsonl"
    if pairs.exists():
        say(f"2/6 pairs: {pairs} already exists")
    else:
        _step(
            f"2/6 pairs: {PAIRS} UUIDs, each with another UUID as its answer",
            [python, "launch/uuid_pairs.py", str(pairs), f"--pairs={PAIRS}", "--kind=messages"],
        )
    data: dict[str, object] = {"model.init_from": start.model, "data.train": pairs, "data.validation": pairs}
    for number, method in enumerate(NAMES, 3):
        settings = {**data, **start.settings}
        settings |= {"method.name": method, "optim.lr": start.rates[method], "train.run_dir": start.run_dir(method)}
        _step(
            f"{number}/6 fine-tuning with {NAMES[method]}: {CONFIG}",
            [*COMMAND, "finetune", CONFIG, *(f"--{key}={value}" for key, value in settings.items())],
        )
    if (start.export / "config.json").exists():
        say(f"5/6 export: {start.export} already exists")
    else:
        _step(
            "5/6 export: a plain LLaMA with MoRA's adapters merged, and its chat template",
            [*COMMAND, "export", str(start.run_dir("mora")), str(start.export)],
        )
    say("6/6 chat, in plain transformers: greedy answers before and after training")
    _chat(start, pairs)
    _report(start, time.monotonic() - begin)
    return 0


def _step(title: str, command: list[str]) -> None:
    demo.step(title, command, "`make demo-finetune`", HOME)


def _start() -> Start:
    home = HOME / "smollm2"
    smollm2 = Start(home / "model", home, RATES)
    if (smollm2.model / "config.json").exists():
        say(f"1/6 model: {smollm2.model} already exists")
        return smollm2
    say("1/6 model: SmolLM2-135M-Instruct from the package index")
    fault = _fetch(smollm2.model)
    if fault is None:
        return smollm2
    print(f"SmolLM2 is not available here ({fault}); the model of `make demo` is used instead", flush=True)
    export = demo.DEMO / "export"
    if not (export / "config.json").exists():
        _step("the model of make demo", [*COMMAND, "demo"])
    return Start(export, HOME / "demo", RATES_OF_DEMO, OF_DEMO)


def _fetch(model: Path) -> str | None:
    """Writes the model's folder; returns None, or one line that says why it failed."""
    packages = HOME / "packages"  # not in the environment, because they are needed only once
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
                lines = done.stderr.strip().splitlines()
                return lines[-1] if lines else f"code {done.returncode}"
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
    print(f"The correct answer is {answer['content']}.", flush=True)


def _answers(model_folder: Path, tokenizer_folder: Path, questions: list[str]) -> list[str]:
    """A model's answer to each question by itself. The initial model uses the chat template of the training, too."""
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
All their metrics:        {own_command()} board {start.home}
Fine-tune on your data:   see docs/finetuning.md; configs/task/*.yaml are the paper's tasks
Start again from nothing: rm -r {HOME}""")


def table(groups: Sequence[Group]) -> list[str]:
    """The lines of a table with one row per method, each of a single run."""
    from relora_mora.experiments.compare.reach import Reach

    reach = Reach(*REACHED)
    rows = [("", "parameters", *(f"step of {share:.0%}" for share in reach.values), "at the end")]
    for group in groups:
        [run] = group.runs
        steps = [reach.steps(run, share) for share in reach.values]
        [last] = reach.last(group)
        cells = ["not reached" if step is None else str(step) for step in steps]
        rows.append((group.label, f"{run.parameters['trainable']:,}", *cells, f"{last:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw(groups: Sequence[Group], picture: Path) -> None:
    """Plots the accuracy of the characters in generated answers by step, as a PNG."""
    from matplotlib.ticker import PercentFormatter

    from relora_mora.experiments.compare.figures import reach_figure
    from relora_mora.experiments.compare.files import save
    from relora_mora.experiments.compare.reach import Reach

    figure = reach_figure(Reach(*REACHED), groups)
    [panel] = figure.axes
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set(ylabel="character accuracy", ylim=(0, 1.02), title=f"Memorizing {PAIRS} UUID pairs")
    save(figure, picture)


if __name__ == "__main__":
    run(main)
