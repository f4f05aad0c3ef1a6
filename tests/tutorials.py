"""The tutorials and the notebook do what they say, with changes that make them short: `make test-extras`.

All blocks of commands and Python of a tutorial run in order, in an empty folder. A block without a language after them
is output that the page shows: each of its lines must appear in the output of the block before it, with other numbers.
``<!-- Ctrl-C after: TEXT -->`` before a block of commands says that the reader presses Ctrl-C when TEXT appears.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.cli.command import INTERRUPTED, run
from relora_mora.commands import main_of
from relora_mora.supervise.exits import REQUEUE
from relora_mora.system.run_folder import RunFolder, read_json_lines
from tests.tools.commands import call, module_of
from tests.tools.helpers import ROOT
from tests.tools.jobs import ends
from tests.tools.pool import Pools
from tests.tools.ports import free_port
from tests.tools.runs import LLAMA, logged_steps, logged_values
from tests.tools.tokenizer_tools import save_bytes_tokenizer
from tests.tools.upload_hub import TOKEN, upload_hub

pytestmark = pytest.mark.distributed
SMOLLM2 = "examples/smollm2.py"
NOTEBOOK = ROOT / "examples" / "tiny_remora.ipynb"
EXTRAS = all(importlib.util.find_spec(name) for name in module_of(SMOLLM2).PACKAGES)
_BLOCK = re.compile(r"(?:^<!-- Ctrl-C after: ([^\n]+) -->\n\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\b[0-9a-f]{16}\b|[-+]?\d[\d.,:]*(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A fenced block; ``stop``: the text after which the reader presses Ctrl-C, or empty."""

    stop: str
    language: str
    text: str


class Keys(io.StringIO):
    """What a command prints, on both streams. Ctrl-C is pressed after the line with ``stop``."""

    def __init__(self, stop: str) -> None:
        super().__init__()
        self.stop = stop

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.stop and text.endswith("\n") and self.stop in self.getvalue():
            self.stop = ""
            os.kill(os.getpid(), signal.SIGINT)
        return written


def follow(name: str, folder: Path, changes: Mapping[str, str], **environment: str) -> list[str]:
    """Runs in a process of a pool: does what a page says, after ``changes`` that make it short. Returns the output of
    each block that ran."""
    page = (ROOT / "docs" / "tutorials" / name).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in page, f"the page does not have {old}"
        page = page.replace(old, new)
    outputs: list[str] = []
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder), mock.patch.dict(os.environ, environment):
        for block in map(Block._make, _BLOCK.findall(page)):
            if block.language == "bash":
                outputs.append(_commands(block))
            elif block.language == "python":
                outputs.append(_python(block, names))
            elif not block.language:
                missing = (
                    set(map(_shape, block.text.splitlines())) - set(map(_shape, outputs[-1].splitlines())) - {"..."}
                )
                assert not missing, f"the page shows\n{missing}\nbut the output is\n{outputs[-1]}"
    return outputs


def _shape(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


def _commands(block: Block) -> str:
    """Commands of relora-mora run in this process, which has imported torch already; all others in a shell."""
    if "relora-mora" not in block.text:
        return subprocess.run(["bash", "-euc", block.text], check=True, capture_output=True, text=True).stdout
    lines = block.text.replace("\\\n", " ").splitlines()
    return "".join(_command(line, block.stop) for line in lines if line)


def _command(line: str, stop: str) -> str:
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "relora-mora", line
    keys = Keys(stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new process; a finished trainer ignores it
    with contextlib.redirect_stdout(keys), contextlib.redirect_stderr(keys):
        try:
            run(main_of(name), arguments, name=f"relora-mora {name}")
        except SystemExit as end:
            code = end.code
    assert code in ((REQUEUE, INTERRUPTED) if stop else (0,)), f"{line} ended with {code}\n{keys.getvalue()}"
    return keys.getvalue()


def _python(block: Block, names: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text, "the page", "exec"), names)
    return out.getvalue()


def test_pretrain_on_your_own_text(pools: Pools, tmp_path: Path) -> None:
    changes = {
        'glob("*.py")': 'glob("[a-c]*.py")',
        "--vocab_size=8192": "--vocab_size=500",
        "sequence_length: 256": "sequence_length: 32\n  workers: 0",
        "merge_every: 10 ": "merge_every: 2 ",
        "warmup_steps: 30": "warmup_steps: 4",
        "steps: 200": "steps: 20",
        "every_steps: 50": "every_steps: 10",
        "max_tokens: 32768": "max_tokens: 2048",
        "Ctrl-C after: step 100:": "Ctrl-C after: step 10:",
        "board runs": f"board runs --port={free_port()}",
    }
    pools(1)(follow, "pretrain.md", tmp_path, changes)
    run = tmp_path / "runs" / "mine"
    stopped, finished = ends(run)
    assert (stopped["code"], finished["code"]) == (75, 0)
    assert 10 <= stopped["step"] < finished["step"] == 20
    assert logged_steps(run, "eval/loss") == [0, 10, 20]
    losses = logged_values(run, "eval/loss")
    assert losses[-1] < losses[0]
    assert (tmp_path / "runs" / "mine_export" / "model.safetensors").is_file()


def test_remora_in_your_own_loop(pools: Pools, tmp_path: Path) -> None:
    changes = {
        '"hidden_size": 128, "intermediate_size": 256': '"hidden_size": 32, "intermediate_size": 64',
        "rank=16": "rank=4",
    }
    pools(1)(follow, "loop.md", tmp_path, changes)


def test_from_smollm2_and_text_to_a_model_on_the_hub(pools: Pools, tmp_path: Path) -> None:
    """With the real model if its packages are installed, otherwise with a tiny one of the same layout."""
    model = tmp_path / "downloaded"
    if EXTRAS:
        assert call(SMOLLM2, model).code == 0
    else:
        sizes = LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True}
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(model)
        save_bytes_tokenizer(model)
    folder = tmp_path / "reader"
    folder.mkdir()
    changes = {
        "hf download HuggingFaceTB/SmolLM2-135M --local-dir models/smollm2": (
            f"mkdir models && cp -r '{model}' models/smollm2"
        ),
        # whole documents are scored
        "file.write_text(text)": "file.write_text(text if number % 10 else text[:300])",
        "--pieces=300": "--pieces=20 --max_documents=30",
        "rank: 32": "rank: 4",
        "sequence_length: 256": "sequence_length: 32\n  workers: 0",
        "sequence_length=256": "sequence_length=32",
        "merge_every: 10 ": "merge_every: 1 ",
        "warmup_steps: 3": "warmup_steps: 0",
        "warmup_steps: 2": "warmup_steps: 0",
        "steps: 30": "steps: 2",
        "max_tokens: 4096": "max_tokens: 64",
        "max_tokens=4096": "max_tokens=64",
        "batch_size: 4 # sequences\n  micro_batch_size: 4": "batch_size: 1\n  micro_batch_size: 1",
    }
    with upload_hub() as hub:
        [outputs] = pools(1)(follow, "smollm2.md", folder, changes, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    before, after = ([], [])
    for name in ("plain", "replay", "extended"):
        lines = read_json_lines(RunFolder(folder / "runs" / name).metrics)
        before.append(next(line for line in lines if "eval/old/loss" in line))
        after.append([line for line in lines if "eval/old/loss" in line][-1])
    assert before[0]["eval/old/loss"] == before[1]["eval/old/loss"] != before[2]["eval/old/loss"]
    [scored] = [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith('{"loss"')]
    for name in ("new", "old"):
        assert scored["sets"][name]["digest"] == after[1][f"eval/{name}/digest"]
        close = pytest.approx(after[1][f"eval/{name}/bits_per_byte"], rel=0.02)  # in bfloat16
        assert scored["sets"][name]["bits_per_byte"] == close
    pushed = hub.files["OWNER/smollm2-headers"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= pushed.keys()
    assert b"| old | " in pushed["README.md"] and b"weight 0.2" in pushed["README.md"]


def run_notebook(steps: int) -> str:
    """Runs in a process of a pool: what the code cells print. No window opens."""
    output = io.StringIO()
    names = {"__name__": "__main__"}
    with mock.patch.dict(os.environ, {"STEPS": str(steps), "MPLBACKEND": "agg"}), contextlib.redirect_stdout(output):
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        from matplotlib import pyplot

        assert pyplot.get_fignums() == [1, 2, 3, 4]
        assert all(axes.has_data() for number in (1, 2, 3, 4) for axes in pyplot.figure(number).axes)
        pyplot.close("all")
    return output.getvalue()


def test_the_notebook(pools: Pools) -> None:
    [output] = pools(1)(run_notebook, 12)  # with a merge after every second step
    assert re.findall(r"step (\d+): .* operator (\d -> \d)", output) == [
        ("2", "1 -> 2"),
        ("4", "2 -> 1"),
        ("6", "1 -> 2"),
        ("8", "2 -> 1"),
        ("10", "1 -> 2"),
    ]
    ranks = list(map(int, re.findall(r"rank (\d+) of 256", output)))
    assert ranks[0] <= 128 < ranks[1] <= 192
    assert "the merged weight is W + D M C up to 0e+00" in output
