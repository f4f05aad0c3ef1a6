"""The demo of fine-tuning if SmolLM2 is not available: from the pairs to the picture and the chat."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.config.checks.combinations import unused_by
from relora_mora.config.load import FINETUNING, load_config
from relora_mora.experiments.compare.groups import Group, group_runs
from relora_mora.experiments.compare.runs import read_run
from tests.experiments.compare.folders import append_metrics, write_run
from tests.tools.commands import call, module_of, refused, run_main
from tests.tools.helpers import ROOT
from tests.tools.pool import Pools
from tests.tools.tokenizer_tools import train_tokenizer

DEMO_FINETUNE = "launch/demo_finetune.py"
PNG = b"\x89PNG\r\n"


@pytest.fixture
def finetuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The program with its folders in ``tmp_path``, without a package index, and four steps with the demo's model."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    module = module_of(DEMO_FINETUNE)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "HOME", tmp_path / "home")
    monkeypatch.setattr(module.demo, "DEMO", tmp_path / "demo")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setitem(module.OF_DEMO, "train.epochs", 4)
    monkeypatch.setitem(module.OF_DEMO, "eval.every_steps", 2)
    return module


def save_demo_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    train_tokenizer(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=256, **sizes)).save_pretrained(folder)


@pytest.mark.distributed
def test_without_smollm2_the_model_of_the_demo_learns(
    finetuning: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pools: Pools,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = []

    def step(title: str, command: list[str], again: str, folder: Path) -> None:
        assert command[0] == sys.executable
        assert (again, folder) == ("`make demo-finetune`", finetuning.HOME)
        name, *arguments = command[1:] if command[1] != "-m" else command[3:]
        ran.append(name)
        if name == "demo":
            save_demo_model(tmp_path / "demo" / "export")
            return
        (answer,) = pools(1)(call, name, *arguments)
        assert answer.code == 0, answer

    monkeypatch.setattr(finetuning.demo, "step", step)
    assert finetuning.main() == 0
    assert ran == ["demo", "launch/uuid_pairs.py", "finetune", "finetune", "export"]
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "is not available here" in line]
    assert "No matching distribution found for" in line
    assert "`make demo`" in line
    assert out.count("  before: ") == out.count("  after:  ") == 2
    assert finetuning.ENGLISH in out
    heads, *rows = re.search(r"^ +parameters.*\n.*MoRA.*\n.*LoRA.*$", out, re.MULTILINE)[0].splitlines()
    assert heads.split("  ")[-1] == "at the end"
    assert all(row.endswith("%") for row in rows)
    for method in ("mora", "lora"):
        run = read_run(tmp_path / "home" / "demo" / method)
        assert list(run.series(finetuning.REACHED[0])) == [0, 2, 4]
    picture = tmp_path / "home" / "demo" / "accuracy.png"
    assert picture.read_bytes().startswith(PNG)
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["demo", "pairs.jsonl"]

    metrics = tmp_path / "home" / "demo" / "mora" / "metrics.jsonl"
    before = metrics.read_bytes()
    ran.clear()
    assert finetuning.main() == 0
    assert ran == ["finetune"] * 2  # which find that all steps are done
    assert metrics.read_bytes() == before


def test_an_existing_model_is_used(finetuning: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(finetuning, "_fetch", None)
    save_demo_model(tmp_path / "home" / "smollm2" / "model")
    start = finetuning._start()
    assert start.model == tmp_path / "home" / "smollm2" / "model"
    assert not start.settings


def test_matplotlib_is_required_before_anything_runs(finetuning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning.importlib.util, "find_spec", lambda _: None)
    refused(run_main(finetuning.main), "matplotlib: not installed", "make demo-finetune")
    assert not finetuning.HOME.exists()


@pytest.fixture
def groups(finetuning: ModuleType, tmp_path: Path) -> list[Group]:
    """A made-up run of each method; LoRA's forgets again and does not get to the end."""
    curves = {"mora": [0.0, 0.5, 0.94, 0.95, 1.0], "lora": [0.0, 0.1, 0.6, 0.4, 0.45]}
    runs = []
    for method, curve in curves.items():
        name = {"name": method}
        folder = write_run(tmp_path / method, [1.0], method=name, optim={"lr": float(finetuning.RATES[method])})
        append_metrics(folder, finetuning.REACHED[0], curve)
        runs.append(read_run(folder))
    return group_runs(runs)


def test_the_table_has_the_steps_to_each_share(finetuning: ModuleType, groups: list[Group]) -> None:
    assert finetuning.table(groups) == [
        "                parameters  step of 50%  step of 95%  at the end",
        "MoRA, lr 0.002   1,234,567          100          300      100.0%",
        "LoRA, lr 0.005   1,234,567          200  not reached       45.0%",
    ]


def test_the_picture_is_drawn(finetuning: ModuleType, groups: list[Group], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'relora_mora[plot]'")
    picture = tmp_path / "accuracy.png"
    finetuning.draw(groups, picture)
    assert picture.read_bytes().startswith(PNG)


def test_settings_are_of_all_pairs_in_every_step(finetuning: ModuleType) -> None:
    config = load_config(finetuning.CONFIG, defaults=FINETUNING)
    assert not unused_by(config)
    assert config.train.batch_size == finetuning.PAIRS
    assert config.data.lanes == 1
    assert config.data.train == config.data.validation
    assert config.data.packing == "none"
    assert config.eval.generate == finetuning.PAIRS
    assert config.optim.lr == float(finetuning.RATES["mora"])
