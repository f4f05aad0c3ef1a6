"""The tutorials and the notebook do what they say, with changes that make them short: `make test-extras`."""

import contextlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.system.run_folder import RunFolder, read_json_lines
from tests.tools.commands import call, module_of
from tests.tools.helpers import ROOT
from tests.tools.jobs import ends
from tests.tools.pool import Pools
from tests.tools.ports import free_port
from tests.tools.runs import LLAMA, logged_steps, logged_values
from tests.tools.tokenizer_tools import save_bytes_tokenizer
from tests.tools.tutorials import follow
from tests.tools.upload_hub import TOKEN, upload_hub

pytestmark = pytest.mark.distributed
SMOLLM2 = "examples/smollm2.py"
NOTEBOOK = ROOT / "examples" / "tiny_remora.ipynb"
EXTRAS = all(importlib.util.find_spec(name) for name in module_of(SMOLLM2).PACKAGES)


def follow_page(pools: Pools, name: str, folder: Path, changes: Mapping[str, str]) -> list[str]:
    """The outputs of a page's blocks."""
    page = (ROOT / "docs" / "tutorials" / name).read_text(encoding="utf-8")
    [outputs] = pools(1)(follow, page, folder, changes)
    return list(outputs)


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
    follow_page(pools, "pretrain.md", tmp_path, changes)
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
    follow_page(pools, "loop.md", tmp_path, changes)


def follow_with_hub(page: str, folder: Path, changes: Mapping[str, str], url: str) -> list[str]:
    """Runs in a process of a pool: :func:`follow` for somebody who is logged in to the hub at ``url``."""
    with mock.patch.dict(os.environ, {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN}):
        return follow(page, folder, changes)


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
    page = (ROOT / "docs" / "tutorials" / "smollm2.md").read_text(encoding="utf-8")
    with upload_hub() as hub:
        [outputs] = pools(1)(follow_with_hub, page, folder, changes, hub.url)
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
