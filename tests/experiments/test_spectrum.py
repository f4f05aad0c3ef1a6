"""Singular values of updates: LoRA's rank is its adapters', ReLoRA's the sum of its merges', MoRA's up to R."""

from pathlib import Path
from typing import Any

import pytest
import torch

from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint
from relora_mora.experiments.spectrum import rank_columns, spectra_of
from tests.tools.commands import call
from tests.tools.runs import checkpoint_at, run_config, train, write_inputs

SPECTRUM = "spectrum"
RANK = 3
LAYERS = 2
SELDOM = {"checkpoint": {"every_steps": 9}, "eval": {"every_steps": 0, "at_start": False}}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(inputs: Path, tokenizer_path: str, pools: Any) -> dict[str, Path]:
    """LoRA, ReLoRA after two merges, MoRA, and LoRA that began with the ReLoRA run."""
    begins = {"lora": None, "relora": None, "mora": None, "further": str(inputs / "relora")}
    for name, init_from in begins.items():
        method = {"name": "lora" if name == "further" else name, "rank": RANK}
        model = {"init_from": init_from}
        config = run_config(inputs, tokenizer_path, inputs / name, method=method, model=model, **SELDOM)
        pools(1)(train, config)
    return {name: inputs / name for name in begins}


def _ranks(run: Path) -> set[int]:
    """The ranks of the updates of all layers; smaller values are rounding errors."""
    spectra = spectra_of(CheckpointReader(find_checkpoint(run)))
    assert [len(layers) for layers in spectra.values()] == [LAYERS] * 7
    return {int((values > 1e-4 * values[0]).sum()) for layers in spectra.values() for values in layers}


def test_an_update_has_the_rank_of_its_adapters(runs: dict[str, Path]) -> None:
    assert _ranks(runs["lora"]) == {RANK}
    assert _ranks(runs["relora"]) == {3 * RANK}, "of two merges, and of the adapter since"
    assert min(_ranks(runs["mora"])) > RANK
    assert _ranks(runs["further"]) == {RANK}, "a run is compared with its own initial weights"


@pytest.mark.more
def test_a_changed_seed_does_not_change_the_initial_weights(
    inputs: Path, tokenizer_path: str, pools: Any, tmp_path: Path
) -> None:
    method = {"name": "lora", "rank": RANK}
    pools(1)(train, run_config(inputs, tokenizer_path, tmp_path, method=method), stop_after=5)
    other = {"seed": 9, "allow_changes": ["train.seed"]}
    pools(1)(train, run_config(inputs, tokenizer_path, tmp_path, method=method, train=other))
    assert _ranks(tmp_path) == {RANK}


def test_initial_weights_must_be_unchanged(runs: dict[str, Path], tmp_path: Path) -> None:
    source = runs["relora"]
    newest = checkpoint_at(source, 10)
    newest.rename(tmp_path / newest.name)
    with pytest.raises(
        CheckpointError, match=r"further.*began with other weights than model.init_from holds now .*relora"
    ):
        spectra_of(CheckpointReader(find_checkpoint(runs["further"])))
    (tmp_path / newest.name).rename(newest)
    source.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"further.*began with .*relora .*, which no longer exists"):
        spectra_of(CheckpointReader(find_checkpoint(runs["further"])))
    (tmp_path / "moved").rename(source)
    assert _ranks(runs["further"]) == {RANK}


def test_the_table_has_means_over_layers() -> None:
    mixed = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])  # 4 and 1
    steep = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert rank_columns([{"q_proj": mixed}, {"q_proj": steep}], 0.5) == {"q_proj": ["2; 2", "1; 1"]}


@pytest.mark.more
def test_the_command_prints_a_table_and_draws(runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'relora_mora[plot]'")
    given = (runs["lora"], runs["relora"], runs["relora"] / "../lora")
    answer = call(SPECTRUM, *given, f"--out={tmp_path / 'out'}")
    assert answer.code == 0, answer
    assert [line.split()[1] for line in answer.out.splitlines()[2:4]] == [
        f"{runs['relora']}/../lora",
        str(runs["relora"]),
    ]
    assert "| down_proj |" in answer.out
    assert (tmp_path / "out" / "spectrum.md").read_text() == answer.out
    assert (tmp_path / "out" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
