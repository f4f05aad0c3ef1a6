"""`relora-mora plan`: what it prints, as text and as JSON, and what it refuses."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest

from relora_mora.config.load import load_config
from relora_mora.config.shipped import MODELS, SETTINGS, shipped_files
from relora_mora.model.config import read_model_config
from relora_mora.sizing.measure import flops_per_token
from tests.tools.commands import PLAN, call, refused
from tests.tools.each import each
from tests.tools.grids import rest
from tests.tools.helpers import ROOT

CONFIG = ROOT / "configs" / "run" / "tiny_remora_paper.yaml"


pytestmark = pytest.mark.usefixtures("at_root")


def test_command_line_json() -> None:
    values = json.loads(answer(CONFIG, "--gpus_per_node=2", "--train.steps=2000", "--tokens_per_second=4096", "--json"))
    config = load_config(CONFIG)
    assert values["tokens"] == 8_192_000
    assert values["seconds"] == 2000
    assert values["flops"]["total"] == flops_per_token(read_model_config(config.model), config)
    assert values["memory"]["2"]["device"] > values["memory"]["2"]["activations"] > 0
    # settings that only other methods use do not keep a run from its plan
    unused = ("--method.name=full", "--method.rank=33", "--method.operators=[6]")
    assert json.loads(answer(CONFIG, *unused, "--json"))["method"] == "full"


def answer(*arguments: object) -> str:
    said = call(PLAN, *arguments)
    assert said.code == 0, (arguments, said.err)
    return said.out


def lines_of(*arguments: object) -> list[str]:
    """The lines of an answer, which are at most 100 columns wide."""
    lines = answer(*arguments).splitlines()
    assert max(map(len, lines)) <= 100, (arguments, lines)
    return lines


@pytest.mark.more
def test_an_answer_has_three_lines() -> None:
    sizes = "--model.overrides={intermediate_size: 5464}"  # which need no note
    ask = ["paper_1_3b_full", sizes, "--device=A10G", "--gpus-per-node=8"]
    fits, time, sent = lines_of(*ask, "--nodes", "2", "--model.activation_checkpointing=true")
    assert fits.startswith("fits: ") and "of 22.4 GiB on each a10g at ZeRO 1" in fits
    assert "on 16 a10g for 5.24 billion tokens" in time
    assert "GB per step between hosts" in sent
    fits, _, sent = lines_of(*ask, "--nodes=1", "--train.zero_stage=0", "--train.micro_batch_size=1")
    assert "does NOT fit" in fits and "--train.zero_stage=1" in fits
    assert "within the host" in sent
    fits, _, sent, *note = lines_of("paper_1_3b_full", sizes, "--device=a10g", "--gpus_per_node=1")
    assert "does NOT fit" in fits and "lower train.micro_batch_size" in " ".join(note)
    assert "one device" in sent
    fits, *_ = lines_of("paper_250m_remora", "--device=a10g", "--gpus_per_node=1")
    assert "GiB in host memory" in fits
    needs, time, _ = lines_of("tiny_full", "--gpus_per_node=2", "--device=cpu", "--tokens_per_second=2048")
    assert needs.startswith("fits: ") and "for each process;" in needs and "33 min on 2 cpu" in time


@each(
    "arguments",
    [
        {"--gpus_per_node=3": "not a multiple of train.micro_batch_size 8 x 3 ranks"},
        {"--nodes=2": "--gpus_per_node: missing with --nodes=2"},
        {"--link_gbits=10": "--link_gbits: a single host does not use its network"},
        {"--data.sequence_length=4096": "max_position_embeddings"},
        {"--method.rank=33": "", "--method.operators=[6]": "operator 6 needs an even R"},
        {
            "--device=h100": "",
            "--train.precision=fp32": "",
            "--method.base=fp8": "",
            "--method.base_products=true": "the results of fp8 products are in bf16; use train.precision=bf16",
        },
        {
            "--device=h1000": "--device: got 'h1000'",
            "--nodes=2": "4 faults in the command line:",
            "--train.steps=-3": "train.steps: got -3",
            "--method.rnk=3": "rnk",
        },
    ],
)
def test_all_mistakes_of_a_command_line_are_reported(arguments: dict[str, str]) -> None:
    refused(call(PLAN, CONFIG, *arguments), *arguments.values())


NOTES = {
    "llama_9m --method.name=full": "the method is Full rank, on any text note: vocab_size",
    "llama_9m --finetune": "MoRA of rank 8",
    "paper_tiny": "study of 35 runs",
    "math": "train.epochs",
    "memory_tiny": "not on this machine",
    "mine": "ReMoRA of rank 64",
}


@pytest.mark.parametrize("only", [NOTES, *rest(((),))])
def test_all_names_have_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: Collection[str]) -> None:
    monkeypatch.chdir(tmp_path)  # no text, tokenizer or weights are here
    shutil.copy(ROOT / "configs/model/llama_tiny.json", "mine")
    names = {*shipped_files([*SETTINGS, *MODELS]), "mine"}
    assert names > {name.split()[0] for name in NOTES}
    for name in only or names:
        if not only and name.startswith("paper_"):
            continue  # their plans are in docs/recipes.md
        first, *lines = lines_of(*name.split(), "--gpus_per_node=1", "--device=h100")
        assert first.startswith("fits: ") and NOTES.get(name, "") in " ".join(lines), (name, first, lines)
